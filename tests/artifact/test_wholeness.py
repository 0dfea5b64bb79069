"""A folder that knows its own bytes, a full disk, signals, and blocks that know their run, with real exports."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

import qexport
from helpers.commands import Command
from qexport.api.stages.capturing import capture_model
from qexport.artifact import checksums, owner
from qexport.artifact import manifest as manifests
from qexport.artifact.output import claimed, work_folder
from qexport.artifact.ownership import is_export
from qexport.calibrate import shards
from qexport.capture.blocks import Block
from qexport.errors import InputError, PassError
from qexport.runtime.seq2seq import is_seq2seq
from qexport.runtime.session import open_session

RECIPE = "w4a16_g32_rtn"


@pytest.fixture(scope="module")
def exported(export_folder) -> Path:
    return export_folder("llama", RECIPE)


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_doctor_names_files_that_changed(run, copy):
    code, out, _ = run("doctor", copy)
    assert "ok  files of the export" in out
    with (copy / "model.onnx.data").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff\x00\xff")
    (copy / "config.json").write_text("{}")
    (copy / "notes.txt").write_text("mine")
    code, out, _ = run("doctor", copy)
    assert code == 1 and "BAD model.onnx.data" in out and "no  config.json" in out and "notes.txt" in out
    with pytest.raises(InputError, match="model.onnx.data: is not as the export wrote it: other bytes"):
        open_session(copy)


def test_doctor_of_a_folder_that_is_no_export(run, tmp_path):
    code, _, err = run("doctor", tmp_path)
    assert code == 2 and "has no checksums.json" in err


COMMANDS = {
    "doctor": lambda run, out: run("doctor", out)[0] == 0,
    "optimize": lambda run, out: run("optimize", out)[0] == 0,
    "a session": lambda run, out: open_session(out) is not None,
    "generate, which asks first whether it is two": lambda run, out: not is_seq2seq(out) and is_export(out),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_opens_an_export_brings_back_one_that_a_killed_export_had_moved_aside(run, copy, tmp_path, command):
    work = work_folder(copy)
    owner.take(work, "exporting").release()
    (work / "moving").touch()
    (work / "new").mkdir()
    copy.rename(work / "old")
    assert COMMANDS[command](run, copy)
    assert os.listdir(tmp_path) == ["copy"] and checksums.changed(copy) == {}


def test_what_a_living_export_has_moved_aside_stays_there(run, copy):
    with claimed(copy, True) as work:
        copy.rename(work.folder / "old")
        code, _, err = run("doctor", copy)
        assert code == 2 and f"process {os.getpid()}" in err and "(exporting, since" in err
        assert (work.folder / "old").is_dir()
        work.settle()
    assert checksums.changed(copy) == {}


def test_of_two_exports_that_start_together_one_makes_it_and_the_other_says_who_does(model_folder, tmp_path):
    out, schemes = tmp_path / "out", ("w4a16_g32", "w8a16_g32")
    rest = ["--calibration", "random", "--samples", "8", "--sequence-length", "16"]
    model = model_folder("llama")
    started = [Command(tmp_path / scheme, "export", model, "-o", out, "-r", scheme, *rest) for scheme in schemes]
    codes = [command.wait() for command in started]
    said = [command.stderr for command in started]
    assert sorted(codes) == [0, 2], said
    winner, loser = codes.index(0), codes.index(2)
    sentence = said[loser].strip().splitlines()[-1]
    assert f"process {started[winner].pid} on " in sentence and "(exporting, since" in sentence, said[loser]
    assert "Traceback" not in said[loser] and sorted(os.listdir(tmp_path)) == sorted(["out", *schemes])
    assert checksums.changed(out) == {}
    assert yaml.safe_load((out / "recipe.yaml").read_text())["scheme"] == schemes[winner]
    assert {entry.scheme for entry in manifests.load(out).linears} <= {schemes[winner], "float"}
    assert schemes[winner] in (out / "README.md").read_text()
    assert schemes[loser] not in (out / "report.json").read_text()


def sign(handle: int) -> None:
    time.sleep(0.1)
    owner._write(handle, "exporting")


def died(folder, what: str) -> None:
    """An owner file as a process leaves it that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    lock = owner.take(folder, what)
    said = json.loads((folder / owner.OWNER_FILE).read_text())
    os.pwrite(lock._handle, json.dumps(said | {"pid": process.pid}).encode().ljust(owner._LENGTH), 0)
    lock.release()


@pytest.mark.parametrize("before", ["nothing", "a dead process"])
def test_who_comes_between_a_lock_and_its_signature_waits_for_the_name(tmp_path, before):
    folder = tmp_path / "work"
    folder.mkdir()
    if before == "a dead process":
        died(folder, "planning")
    handle = os.open(folder / owner.OWNER_FILE, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    signing = threading.Thread(target=sign, args=(handle,))
    signing.start()
    with pytest.raises(owner.Busy, match=rf"process {os.getpid()} on .* \(exporting, since"):
        owner.take(folder, "optimizing")
    signing.join()
    os.close(handle)


def test_a_lock_that_nobody_signs_is_still_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "_UNTIL_SIGNED", 0.05)
    folder = tmp_path / "work"
    folder.mkdir()
    died(folder, "planning")
    handle = os.open(folder / owner.OWNER_FILE, os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(owner.Busy, match="another process is at work there"):
        owner.take(folder, "optimizing")
    os.close(handle)


def graph_block(captured) -> Block:
    return captured("llama").blocks[1]


def test_everything_noted_at_a_node_comes_back(captured, tmp_path):
    block = graph_block(captured)
    node = next(n for n in block.module.graph.nodes if n.op == "call_function")
    noted = {"convolution": "conv", "without_outliers": True, "mine": {"a": (1, 2.5, torch.int8)}, "other": node}
    node.meta |= noted
    shards.save_block(tmp_path / "b.safetensors", block, {}, "run")
    back, _ = shards.load_block(tmp_path / "b.safetensors", "run")
    again = next(n for n in back.module.graph.nodes if n.op == "call_function")
    assert {k: again.meta[k] for k in noted if k != "other"} == {k: v for k, v in noted.items() if k != "other"}
    assert again.meta["other"] is again


def test_what_cannot_be_kept_is_an_error_when_it_is_written(captured, tmp_path):
    block = graph_block(captured)
    next(n for n in block.module.graph.nodes if n.op == "call_function").meta["mine"] = object()
    with pytest.raises(PassError, match="the metadata 'mine' of a node is a object"):
        shards.save_block(tmp_path / "b.safetensors", block, {}, "run")


def test_a_block_of_another_run_is_refused(captured, tmp_path):
    shards.save_block(tmp_path / "b.safetensors", graph_block(captured), {"x": torch.zeros(1)}, "one")
    with pytest.raises(InputError, match="was written by another export"):
        shards.load_tensor(tmp_path / "b.safetensors", "x", "two")


class Net(torch.nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Stop(Exception):
    pass


def stopped(stage, what, done, total):
    if stage == "quantize" and done == 2:
        raise Stop


def test_resume_knows_the_weights_of_a_module(tmp_path):
    given = {"example_inputs": (torch.randn(2, 64),), "out_dir": tmp_path / "out"}
    with pytest.raises(Stop):
        qexport.export(Net(0), RECIPE, **given, progress=stopped)
    with pytest.raises(InputError, match="holds an export of another model"):
        qexport.export(Net(1), RECIPE, **given, resume=True)
    qexport.export(Net(0), RECIPE, **given, resume=True)


def test_resume_knows_the_config_and_a_weight_file_replaced_with_its_time(model_folder, tmp_path):
    folder, out = Path(shutil.copytree(model_folder("llama"), tmp_path / "model")), tmp_path / "out"
    with pytest.raises(Stop):
        qexport.export(folder, RECIPE, out_dir=out, progress=stopped)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(json.loads(config) | {"rms_norm_eps": 0.1}))
    with pytest.raises(InputError, match="holds an export of another model"):
        qexport.export(folder, RECIPE, out_dir=out, resume=True)
    (folder / "config.json").write_text(config)
    weights = folder / "model.safetensors"
    info, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(info.st_atime_ns, info.st_mtime_ns))
    with pytest.raises(InputError, match="holds an export of another model"):
        qexport.export(folder, RECIPE, out_dir=out, resume=True)
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(info.st_atime_ns, info.st_mtime_ns))
    with pytest.raises(InputError, match="holds an export of another model"):
        qexport.export(folder, "w8a16", out_dir=out, resume=True)
    qexport.export(capture_model(folder), RECIPE, out_dir=out, resume=True)
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_a_sentence_and_resume_goes_on(run, model_folder, small_disk):
    """Filled a little less each time, until the export fits: whatever writes then meets the end of the disk."""
    out, said = small_disk / "out", []
    for left in (8, 40, 100, 180, 300, 450, 600, 800):
        (small_disk / "filling").write_bytes(b"")
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        (small_disk / "filling").write_bytes(bytes(max(0, free - left * 1024)))
        code, _, err = run("export", model_folder("llama"), "-o", out, "-r", RECIPE, "--resume")
        if code == 0:
            break
        said.append(err.splitlines()[-1])
        assert code == 2 and "the disk is full. Free some space" in said[-1] and not out.exists(), err
    (small_disk / "filling").unlink()
    assert len(said) > 1
    if not out.exists():
        assert run("export", model_folder("llama"), "-o", out, "-r", RECIPE, "--resume")[0] == 0
    assert os.listdir(small_disk) == ["out"]


@pytest.mark.parametrize(
    ("number", "code", "word"), [("SIGTERM", 143, "stopped by SIGTERM"), ("SIGINT", 130, "interrupted")]
)
def test_a_signal_cleans_up_and_says_what_is_kept(
    run, model_folder, tmp_path, monkeypatch, hears_signals, number, code, word
):
    """It comes while a layer is written; tests/cli has one that comes from outside."""
    out, save = tmp_path / "out", shards.save_block

    def save_and_signal(place, block, stored, of_run):
        save(place, block, stored, of_run)
        if block.name == "model.layers.0":
            signal.raise_signal(getattr(signal, number))

    monkeypatch.setattr(shards, "save_block", save_and_signal)
    ended, _, said = run("export", model_folder("llama"), "-o", out, "-r", RECIPE)
    assert ended == code, said
    last = said.splitlines()[-1]
    assert last.startswith(word) and "finished blocks are kept in" in last and "--resume" in last
    assert sorted(os.listdir(work_folder(out))) == ["blocks", "qexport-owner.json"]
