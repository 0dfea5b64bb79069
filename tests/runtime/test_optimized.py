"""The optimized copy of an export: same numbers, used exactly when it fits, there completely or not at all."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import qexport
from helpers.onnx_decoder import ACCURACY, write_tiny_decoder
from helpers.tokenizer_files import write_word_tokenizer
from qexport import cli
from qexport.api.exporting import export
from qexport.artifact import manifest as manifests
from qexport.artifact.manifest import CUDA
from qexport.errors import InputError, RuntimeProblem
from qexport.runtime import optimized, processor
from qexport.runtime import optimized_cache as cache
from qexport.runtime.decoder import Decoder
from qexport.runtime.layout import ALIGNMENT, lay_out
from qexport.runtime.session import open_session, optimized_graph

IDS = np.array([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with its optimized copy; not to be written to."""
    folder = tmp_path_factory.mktemp("made") / "export"
    write_tiny_decoder(folder)
    return folder, qexport.optimize(folder, repeats=1)


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it with the times of its files, as `cp -a` makes it."""
    return Path(shutil.copytree(made[0], tmp_path / "export"))


def uses_copy(folder, manifest=None, **options):
    """Whether a session on the folder is one on its optimized copy."""
    loaded = Path(open_session(folder, manifest, **options)._model_path)
    assert loaded in (folder / "model.onnx", folder / "optimized" / "model.onnx")
    return loaded.parent != folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- the numbers


@pytest.mark.parametrize("shared_cache", [False, True])
def test_same_bits_in_prefill_and_decode(tmp_path, shared_cache):
    manifest = write_tiny_decoder(tmp_path, shared_cache=shared_cache)
    manifests.save(manifest.model_copy(update={"session": {ACCURACY: "4"}}), tmp_path)
    qexport.optimize(tmp_path, repeats=1)
    assert uses_copy(tmp_path)
    plain, quick = (
        Decoder(open_session(source, threads=1), manifest.settings, max_length=16)
        for source in (tmp_path / "model.onnx", tmp_path)
    )
    for part in (IDS, IDS[:, :1], IDS[:, 1:2]):
        expected, found = plain.run(part), quick.run(part)
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.by_default("w4a16_g32_rtn")
@pytest.mark.parametrize("recipe", ["w4a16_g32_rtn", "w8a8_dyn", "w2a16_g64_asym"])
def test_schemes(model_folder, tmp_path, recipe):
    out = export(model_folder("llama"), recipe, out_dir=tmp_path / "out", calibration="random").folder
    qexport.optimize(out, repeats=1)
    settings = manifests.load(out).settings
    expected, found = (
        Decoder(open_session(source, threads=1), settings, max_length=16).run(IDS)
        for source in (out / "model.onnx", out)
    )
    assert uses_copy(out)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("width", [4, 64])  # 4: so small that it needs no data file
def test_a_module(tmp_path, width):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, 96 * width // 64), nn.GELU(), nn.Linear(96 * width // 64, width)).eval()
    batch = (torch.randn(2, 5, width),)
    out = export(net, "w8a8_static", out_dir=tmp_path / "out", example_inputs=batch, calibration=[batch]).folder
    qexport.optimize(out, repeats=1)
    assert uses_copy(out)
    x = np.random.default_rng(1).standard_normal((4, 5, width)).astype(np.float32)
    plain, quick = (open_session(source, threads=1) for source in (out / "model.onnx", out))
    name = plain.get_inputs()[0].name
    np.testing.assert_array_equal(quick.run(None, {name: x})[0], plain.run(None, {name: x})[0])


def test_every_packed_weight_is_aligned_and_whole(made, tmp_path):
    """ONNX Runtime reads a packed weight shifted, and computes NaN, where its place in memory is not aligned."""
    folder, manifest = made[0], manifests.load(made[0])
    options = optimized.session_options(manifest)
    options.optimized_model_filepath = str(tmp_path / "model.onnx")
    for key, value in optimized._SAVING.items():
        options.add_session_config_entry(key, value)
    optimized.start(folder / "model.onnx", options, manifest.provider)
    new = tmp_path / "new"
    new.mkdir()
    lay_out(tmp_path / "model.onnx", folder / "model.onnx", new)
    before, after = packed_weights(tmp_path), packed_weights(new)
    assert before.keys() == after.keys() and len(after) >= 8
    assert all(offset % ALIGNMENT == 0 for offset, _ in after.values())
    assert {name: blob for name, (_, blob) in before.items()} == {name: blob for name, (_, blob) in after.items()}


def packed_weights(folder):
    """Initializer name -> (offset, bytes) of its packed form."""
    found = {}
    for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            if entry.key.startswith("prepacked"):
                offset, length, _ = entry.value.split("|")[1].split(";")
                with (folder / "model.onnx.data").open("rb") as file:
                    file.seek(int(offset))
                    found[tensor.name] = int(offset), file.read(int(length))
    return found


def test_a_copy_with_other_numbers_is_not_kept(tmp_path, monkeypatch):
    write_tiny_decoder(tmp_path)
    before = names(tmp_path)

    def damaged(saved, original, folder):
        shared = lay_out(saved, original, folder)
        data = folder / "model.onnx.data"
        data.write_bytes(bytes(data.stat().st_size))
        return shared

    monkeypatch.setattr(optimized, "lay_out", damaged)
    with pytest.raises(RuntimeProblem, match="computes other numbers"):
        qexport.optimize(tmp_path)
    assert names(tmp_path) == before and not uses_copy(tmp_path)


# --- when it is used


def test_used_for_the_folder_and_not_for_the_file(made):
    folder, _ = made
    assert uses_copy(folder) and uses_copy(folder, threads=1) and uses_copy(folder, provider="CPUExecutionProvider")
    assert Path(open_session(folder / "model.onnx")._model_path) == folder / "model.onnx"


def test_not_used_where_the_optimization_itself_is_asked_for(made, tmp_path):
    folder, _ = made
    assert not uses_copy(folder, outputs_path=tmp_path / "optimized.onnx")
    assert not uses_copy(folder, record_assignment=True)
    assert optimized_graph(folder).nodes_per_provider().total() > 0


def test_an_untouched_copy_of_the_folder_keeps_it_and_one_with_new_times_does_not(folder):
    assert uses_copy(folder)
    os.utime(folder / "model.onnx.data", ns=(1, 1))
    assert not uses_copy(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(cache.ort, "__version__", "0.0"),
        lambda patch: patch.setattr(cache.ort, "get_build_info", lambda: "another"),
        lambda patch: patch.setattr(processor, "instruction_sets", lambda: frozenset({"sse2"})),
        lambda patch: patch.setattr(cache, "FORMAT", 99),
    ],
)
def test_not_used_in_another_runtime_or_on_another_processor(made, monkeypatch, change):
    change(monkeypatch)
    assert not uses_copy(made[0])


def test_not_used_with_other_session_entries_or_another_provider(made):
    folder, manifest = made[0], manifests.load(made[0])
    assert not uses_copy(folder, manifest.model_copy(update={"session": {ACCURACY: "4"}}))
    assert cache.find(folder, manifest, CUDA) is None


def test_not_used_for_another_model(folder):
    write_tiny_decoder(folder, seed=1)
    assert not uses_copy(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "shared.data", "key.json"])
def test_not_used_when_a_file_is_missing_or_short(folder, name):
    file = folder / "optimized" / name
    whole = file.read_bytes()
    file.unlink()
    assert not uses_copy(folder)
    file.write_bytes(whole[:-10])
    assert not uses_copy(folder)
    file.write_bytes(whole)
    assert uses_copy(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {}}'])
def test_a_damaged_key_is_no_key(folder, text):
    (folder / "optimized" / "key.json").write_text(text)
    assert not uses_copy(folder)


def test_a_damaged_copy_does_not_keep_the_export_from_loading(folder):
    model = folder / "optimized" / "model.onnx"
    model.write_bytes(bytes(model.stat().st_size))
    assert not uses_copy(folder)


# --- making it


def test_what_is_reported(made):
    folder, info = made
    sizes = {path.name: path.stat().st_size for path in (folder / "optimized").iterdir()}
    assert info.folder == str(folder / "optimized")
    assert info.bytes == sum(sizes.values()) - sizes["shared.data"]
    assert info.model_bytes == sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    assert 0 < info.shared_bytes < info.model_bytes
    assert os.path.samefile(folder / "model.onnx.data", folder / "optimized" / "shared.data")
    assert info.load_seconds.keys() == {"before", "after"} and len(info.samples["after"]) == 1


def test_without_hard_links_the_copy_holds_everything(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    write_tiny_decoder(tmp_path)
    assert qexport.optimize(tmp_path, repeats=1).shared_bytes == 0
    assert uses_copy(tmp_path) and "shared.data" not in names(tmp_path / "optimized")


def test_loading_writes_nothing_unless_asked(tmp_path):
    write_tiny_decoder(tmp_path)
    before = names(tmp_path)
    assert not uses_copy(tmp_path) and names(tmp_path) == before
    assert uses_copy(tmp_path, optimize=True)
    made = (tmp_path / "optimized" / "key.json").stat().st_mtime_ns
    assert uses_copy(tmp_path, optimize=True)
    assert (tmp_path / "optimized" / "key.json").stat().st_mtime_ns == made


def test_an_older_copy_is_replaced(folder):
    write_tiny_decoder(folder, seed=1)
    before = (folder / "optimized" / "key.json").read_text()
    qexport.optimize(folder, repeats=1)
    assert uses_copy(folder) and (folder / "optimized" / "key.json").read_text() != before
    assert not [name for name in names(folder) if name.startswith(".")]


@pytest.mark.parametrize("there", [False, True])
def test_interrupted_writing_leaves_what_was_there(made, tmp_path, monkeypatch, there):
    folder = Path(shutil.copytree(made[0], tmp_path / "export"))
    if not there:
        shutil.rmtree(folder / "optimized")
    before = names(folder)

    def interrupted(saved, original, new):
        lay_out(saved, original, new)
        raise KeyboardInterrupt

    monkeypatch.setattr(optimized, "lay_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qexport.optimize(folder)
    assert names(folder) == before and uses_copy(folder) == there


def test_a_folder_that_is_no_copy_is_not_replaced(tmp_path):
    write_tiny_decoder(tmp_path)
    (tmp_path / "optimized").mkdir()
    (tmp_path / "optimized" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="will not be replaced"):
        qexport.optimize(tmp_path)
    assert names(tmp_path / "optimized") == ["notes.txt"]


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.EROFS, "cannot be written. Choose a folder you own"), (errno.ENOSPC, "the disk is full. Free some space")],
)
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, number, message):
    write_tiny_decoder(tmp_path)

    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(optimized, "lay_out", refused)
    with pytest.raises(InputError, match=message) as caught:
        qexport.optimize(tmp_path)
    assert caught.value.place == str(tmp_path)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_what_is_refused(tmp_path):
    with pytest.raises(InputError, match="not an export"):
        qexport.optimize(tmp_path)
    manifest = write_tiny_decoder(tmp_path)
    with pytest.raises(InputError, match="1 or more"):
        qexport.optimize(tmp_path, repeats=0)
    manifests.save(manifest.model_copy(update={"provider": CUDA, "target": "cuda"}), tmp_path)
    with pytest.raises(InputError, match="--target cpu"):
        qexport.optimize(tmp_path)


# --- for others


def test_onnxruntime_genai_loads_the_copy(model_folder, tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    out = export(model_folder("llama"), "w4a16_g32_rtn", out_dir=tmp_path / "out", calibration="random").folder
    write_word_tokenizer(out)
    qexport.optimize(out, repeats=1)
    assert not {"recipe.yaml", "report.json", "manifest.json"} & set(names(out / "optimized"))

    def tokens(folder):
        model = og.Model(str(folder))
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=14, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens([5, 6, 7, 11])
        while not generator.is_done():
            generator.generate_next_token()
        return list(map(int, generator.get_sequence(0)))

    assert tokens(out / "optimized") == tokens(out)


def test_on_the_command_line(made, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(made[0], tmp_path / "export"))
    monkeypatch.setattr(sys, "argv", ["qexport", "optimize", str(folder)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    text = capsys.readouterr().out
    assert not stop.value.code and text.startswith(f"{folder / 'optimized'}: ")
    assert "load: " in text and " instead of " in text and "shares" in text
    monkeypatch.setattr(sys, "argv", ["qexport", "optimize", str(folder), "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(folder / "optimized") and found["load_seconds"]["after"] > 0
    monkeypatch.setattr(sys, "argv", ["qexport", "optimize", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "not an export" in capsys.readouterr().err
