"""Where an export may be made, what it replaces, and what it leaves of what was there."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qexport.artifact import checksums, swap
from qexport.artifact.output import check_output, claimed, inside
from qexport.artifact.owner import Busy
from qexport.artifact.ownership import CARD_MARK, INSIDE, foreign, is_export
from qexport.errors import InputError


def write(folder: Path, mark: str = "one") -> None:
    """What an export would write, as far as these tests care."""
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "qexport": "1", "kind": "decoder", "mark": mark}))
    (folder / "model.onnx").write_text(mark)
    (folder / "README.md").write_text(CARD_MARK)


def make(out: Path, mark: str = "one", overwrite: bool = False) -> list[str]:
    with claimed(out, overwrite) as work:
        with work.appearing() as folder:
            write(folder, mark)
        return work.kept


@pytest.fixture
def out(tmp_path) -> Path:
    make(tmp_path / "out")
    return tmp_path / "out"


def refused(out, words: str, **options) -> None:
    with pytest.raises(InputError, match=words):
        check_output(Path(out), options.pop("overwrite", True), **options)


def test_an_export_appears_and_knows_its_bytes(out, tmp_path):
    assert sorted(os.listdir(out)) == ["README.md", "checksums.json", "manifest.json", "model.onnx"]
    assert os.listdir(tmp_path) == ["out"] and is_export(out) and checksums.changed(out) == {}
    (out / "model.onnx").write_text("two")
    assert checksums.changed(out) == {"model.onnx": "other bytes"}
    with pytest.raises(InputError, match="model.onnx: is not as the export wrote it: other bytes"):
        checksums.check_sample(out)


def test_the_same_files_have_the_same_checksums(out, tmp_path):
    make(tmp_path / "again")
    assert (out / checksums.FILE).read_bytes() == (tmp_path / "again" / checksums.FILE).read_bytes()


def test_a_sample_sees_a_byte_of_a_small_file_and_the_size_of_a_large_one(tmp_path):
    make(tmp_path / "out")
    for size, seen in ((200_000, True), (10_000_000, False)):
        path = tmp_path / "out" / "model.onnx"
        path.write_bytes(bytes(size))
        checksums.write(tmp_path / "out")
        data = bytearray(size)
        data[size // 2 - 5000] = 1  # in a large file between two pieces
        path.write_bytes(data)
        with pytest.raises(InputError):
            checksums.check(tmp_path / "out")
        if seen:
            with pytest.raises(InputError):
                checksums.check_sample(tmp_path / "out")
        else:
            checksums.check_sample(tmp_path / "out")
        path.write_bytes(data[:-1])
        with pytest.raises(InputError, match=f"{size - 1:,} of {size:,} bytes"):
            checksums.check_sample(tmp_path / "out")


def test_only_with_overwrite(out):
    refused(out, "exists already.*--overwrite", overwrite=False)
    assert make(out, "two", overwrite=True) == []
    assert (out / "model.onnx").read_text() == "two"


@pytest.mark.parametrize(
    "manifest", ['{"manifest_version": 3}', '{"format": 1, "qexport": "1", "kind": "decoder"}', "["]
)
def test_a_folder_with_a_manifest_is_no_export_for_that(tmp_path, manifest):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "manifest.json").write_text(manifest)
    (tmp_path / "page" / "thesis.txt").write_text("years")
    refused(tmp_path / "page", "is not an export")
    assert (tmp_path / "page" / "thesis.txt").exists()


def test_files_that_no_export_wrote_come_along(out):
    (out / "notes.txt").write_text("mine")
    (out / "runs" / "deep").mkdir(parents=True)
    (out / "runs" / "deep" / "a.log").write_text("log")
    (out / "empty").mkdir()
    (out / "link").symlink_to("nowhere")
    (out / "optimized").mkdir()
    (out / "optimized" / "key.json").write_text('{"files": {"model.onnx": 3}}')
    (out / "optimized" / "model.onnx").write_text("ours")
    assert foreign(out) == ["empty", "link", "notes.txt", "runs/deep/a.log"]
    assert make(out, "two", overwrite=True) == ["empty", "link", "notes.txt", "runs/deep/a.log"]
    assert (out / "notes.txt").read_text() == "mine" and (out / "runs" / "deep" / "a.log").read_text() == "log"
    assert os.readlink(out / "link") == "nowhere" and (out / "empty").is_dir() and not (out / "optimized").exists()
    assert foreign(out) == ["empty", "link", "notes.txt", "runs/deep/a.log"]  # still no files of the export's


def test_a_name_that_the_new_export_takes_is_kept_under_another(tmp_path):
    with claimed(tmp_path / "out", False) as work, work.appearing() as folder:
        write(folder)
        (folder / "README.md").unlink()
    (tmp_path / "out" / "README.md").write_text("written by me")
    assert make(tmp_path / "out", overwrite=True) == ["README.md.kept"]
    assert (tmp_path / "out" / "README.md.kept").read_text() == "written by me"


def test_without_an_exchange_of_the_system(out, tmp_path, monkeypatch):
    monkeypatch.setattr(swap, "_renameat2", lambda: None)
    make(out, "two", overwrite=True)
    assert (out / "model.onnx").read_text() == "two" and os.listdir(tmp_path) == ["out"]


def test_a_kill_between_two_renames_is_mended_by_the_next_run(out, tmp_path, monkeypatch):
    monkeypatch.setattr(swap, "_renameat2", lambda: None)
    code = (
        "import os, sys; from pathlib import Path; from qexport.artifact import swap;"
        "from qexport.artifact.output import claimed\n"
        "swap._renameat2 = lambda: None\n"
        "sys.addaudithook(lambda e, a: os._exit(9) if e == 'os.rename' and str(a[0]).endswith('new') else None)\n"
        "with claimed(Path(sys.argv[1]), True) as work, work.appearing() as folder:\n"
        "    (folder / 'manifest.json').write_text('{}')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, out]).returncode == 9
    assert sorted(os.listdir(tmp_path)) == [".out.work"]
    with pytest.raises(InputError, match="exists already"):
        make(out)
    assert os.listdir(tmp_path) == ["out"] and (out / "model.onnx").read_text() == "one"


def test_places_that_no_export_can_take(out, tmp_path, monkeypatch):
    refused("/proc", "is a mount point")
    refused("/", "is a mount point")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "dangling", "is a link to .*nowhere, which is not there")
    (tmp_path / "link").symlink_to(out)
    refused(tmp_path / "link", "is a link to .*out. Give that path itself")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "exists already and is not a folder")
    refused(tmp_path / "file" / "out", "file: is not a folder")
    refused(tmp_path / ("x" * 250), "cannot be a folder .*[Nn]ame too long")
    refused("a\0b", "cannot be a folder .*null")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop" / "out", "loop")
    monkeypatch.chdir(out)
    for name in (".", "", "..", out, "../out"):
        refused(name, "is the current folder, or one above it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(out))
    refused(out, "is your home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    refused(out, "model's own folder", model=out)
    refused(out, "model's own folder", model=out / "model.gguf")
    check_output(out, True, model=tmp_path)
    assert (out / "model.onnx").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(tmp_path / "locked" / "out", "cannot be written")


def test_missing_parents_are_made_and_go_again_when_nothing_comes_into_them(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "a" / "b" / "out", False):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    make(tmp_path / "a" / "b" / "out")
    assert is_export(tmp_path / "a" / "b" / "out") and os.listdir(tmp_path / "a" / "b") == ["out"]


def test_a_second_export_to_one_output_is_refused_at_once(tmp_path):
    with claimed(tmp_path / "out", False):
        with pytest.raises(Busy, match=rf"process {os.getpid()} on .* \(exporting, since .*Wait until it is done"):
            make(tmp_path / "out")
        make(tmp_path / "other")
    make(tmp_path / "out")


def test_an_export_is_not_replaced_while_somebody_works_in_it(out):
    with inside(out, "validating") as work:
        assert work.parent == out
        with pytest.raises(Busy, match="validating"):
            make(out, "two", overwrite=True)
    assert not (out / INSIDE).exists() and (out / "model.onnx").read_text() == "one"


def test_a_folder_of_the_user_in_the_place_of_the_work_folder(tmp_path):
    (tmp_path / ".out.work").mkdir()
    (tmp_path / ".out.work" / "mine").write_text("")
    with pytest.raises(InputError, match="is in the way"):
        make(tmp_path / "out")
    assert (tmp_path / ".out.work" / "mine").exists()
    shutil.rmtree(tmp_path / ".out.work")
    (tmp_path / ".out.work").write_text("mine")
    with pytest.raises(InputError, match="is in the way"):
        make(tmp_path / "out")


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    def make_beside():
        with claimed(tmp_path / "out", False) as work, work.appearing() as folder:
            write(folder)
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").write_text("")

    with pytest.raises(InputError, match="exists already"):
        make_beside()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["mine"]


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path):
    def fill():
        with claimed(tmp_path / "out", False) as work, work.appearing():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match="out: the disk is full. Free some space; --resume goes on"):
        fill()
    assert os.listdir(tmp_path) == []
