"""One message and exit code 2 for everything that can be wrong; nothing is left behind, by an interrupt neither."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import qexport
from helpers.commands import Command
from helpers.random_decoders import save_model
from helpers.refused import leftovers, refused
from qexport.capture.decoder import capture_decoder  # noqa: F401  imports what commands need before they are timed
from qexport.recipe import catalogue


def test_no_such_model(run, tmp_path):
    refused(run("export", tmp_path / "nowhere", "-o", tmp_path / "out"), tmp_path / "nowhere")


def test_missing_weights(run, copy, tmp_path):
    (copy / "model.safetensors").unlink()
    refused(run("export", copy, "-o", tmp_path / "out"), copy, "holds no safetensors file")
    assert leftovers(tmp_path) == []


def test_a_shard_that_the_index_names_is_missing(run, copy, tmp_path):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model-00001.safetensors"}})
    )
    refused(run("export", copy, "-o", tmp_path / "out"), "model-00001.safetensors", "missing")


def test_truncated_weights(run, copy, tmp_path):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(run("export", copy, "-o", tmp_path / "out"), weights, "truncated or damaged")
    assert leftovers(tmp_path) == []


def test_nan_weights(run, copy, tmp_path):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, copy / "model.safetensors")
    message = refused(
        run("export", copy, "-o", tmp_path / "out", "-r", "w4a16_g32_rtn"), "model.layers.1.mlp.up_proj.weight"
    )
    assert "1 of 6144 weights are NaN or Inf" in message
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "recipe, parts",
    [
        ("w4a16_g31", ["groups of 31", "Did you mean w4a16_g32?"]),
        ("w5a16", ["5-bit weights"]),
        ("w4a16_g23_rtn", ["unknown scheme", "Did you mean"]),
        ("best", ["no preset, scheme or file 'best'"]),
        ("nowhere.yaml", ["nowhere.yaml", "No such file"]),
    ],
)
def test_unknown_schemes_and_presets(run, model, tmp_path, recipe, parts):
    refused(run("export", model, "-o", tmp_path / "out", "--recipe", recipe), *parts)


def test_an_unknown_recipe_key(run, model, tmp_path):
    (tmp_path / "r.yaml").write_text("scheme: w4a16_g32\nweights:\n  metod: gptq\n")
    refused(
        run("export", model, "-o", tmp_path / "out", "--recipe", tmp_path / "r.yaml"),
        "r.yaml:3",
        "metod",
        "Did you mean method?",
    )


def test_an_override_that_matches_nothing(run, model, tmp_path):
    (tmp_path / "r.yaml").write_text("scheme: w4a16_g32\noverrides:\n- {match: '*.w1', scheme: float}\n")
    refused(run("inspect", model, "--recipe", tmp_path / "r.yaml"), "*.w1", "matches no linear")


def test_calibration_text(run, model, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("too short")
    out = tmp_path / "out"
    refused(run("export", model, "-o", out, "--calibration", tmp_path / "empty.txt"), "empty.txt", "no text")
    refused(
        run("export", model, "-o", out, "--calibration", tmp_path / "short.txt"),
        "9 tokens are fewer than one sample",
        "sequence_length",
    )
    refused(run("export", model, "-o", out, "--calibration", tmp_path / "none.txt"), "none.txt", "No such file")
    refused(run("export", model, "-o", out, "--samples", 0), "samples", "greater than or equal to 1")
    assert leftovers(tmp_path) == ["empty.txt", "short.txt"]


def test_unknown_target(run, model, tmp_path):
    refused(run("export", model, "-o", tmp_path / "out", "--target", "tpu"), "tpu", "cpu, cuda")


def test_dtype(run, model, tmp_path):
    refused(run("export", model, "-o", tmp_path / "out", "--dtype", "bfloat16"), "target cpu", "float32 only")
    cuda = ("--target", "cuda", "--dtype", "bfloat16")
    refused(run("inspect", model, "-r", "w8a8_dyn", *cuda), "w8a8_dyn", "no bfloat16 kernel", "dtype float16")
    code, _, err = run("export", model, "-o", tmp_path / "out", "-r", "w4a16_g32_rtn", *cuda)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["dtype"] == "bfloat16"
    refused(run("generate", tmp_path / "out", "-p", "a", "--provider", "CPUExecutionProvider"), "Run it on CUDA")


def test_an_existing_output_is_kept_unless_told_otherwise(run, model, exported, tmp_path):
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    (out / "mark").write_text("here")
    refused(run("export", model, "-o", out, "-r", "w8a16"), out, "exists already", "--overwrite")
    assert (out / "mark").exists() and qexport.Recipe.load(out / "recipe.yaml").name == "w4a16_g32_rtn"
    code, _, err = run("export", model, "-o", out, "-r", "w8a16", "--overwrite")
    assert code == 0, err
    assert (out / "mark").read_text() == "here" and qexport.Recipe.load(out / "recipe.yaml").name == "w8a16"
    assert leftovers(tmp_path) == ["out"]


def test_a_folder_that_is_no_export_is_never_replaced(run, model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    refused(run("export", model, "-o", tmp_path / "photos", "--overwrite"), "not an export")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_an_output_below_a_file(run, model, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run("export", model, "-o", tmp_path / "file" / "out"), tmp_path / "file", "is not a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output(run, model, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(run("export", model, "-o", tmp_path / "locked" / "out"), "cannot be written")


def test_a_model_that_cannot_be_captured(run, tmp_path):
    folder = save_model("openai_gpt", tmp_path / "copy")
    refused(run("export", folder, "-o", tmp_path / "out"), "does not take a transformers cache")
    assert leftovers(tmp_path) == []


def test_another_kind_of_model(run, copy, tmp_path):
    (copy / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused(run("export", copy, "-o", tmp_path / "out"), "causal language model")


def test_no_config(run, copy, tmp_path):
    (copy / "config.json").write_text("{}")
    refused(run("export", copy, "-o", tmp_path / "out"), "config")


def test_a_full_disk(run, model, tmp_path, monkeypatch):
    import onnx_ir

    def full(model, path, **_):
        Path(path).write_bytes(b"half a model")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx_ir, "save", full)
    refused(run("export", model, "-o", tmp_path / "out", "-r", "w4a16_g32_rtn"), "the disk is full", "--resume")
    # The finished blocks stay for --resume; the half-written file does not.
    assert leftovers(tmp_path) == [".out.work"]
    monkeypatch.undo()
    assert run("export", model, "-o", tmp_path / "out", "-r", "w4a16_g32_rtn", "--resume")[0] == 0
    assert leftovers(tmp_path) == ["out"]


def test_folders_that_are_no_exports(run, model, tmp_path):
    refused(run("generate", tmp_path, "--prompt", "x"), tmp_path, "not an export")
    refused(run("bench", tmp_path / "nowhere"), "nowhere")
    refused(run("validate", model, "--reference", model), model, "not an export")


def test_generate_with_bad_options(run, exported):
    refused(run("generate", exported, "-p", "x", "--temperature", -1), "temperature")
    refused(run("generate", exported, "-p", "x", "--top-p", 0), "top_p")
    refused(run("generate", exported, "-p", "x", "--chat"), "no chat template")


def test_an_error_as_the_shell_sees_it(tmp_path):
    done = Command(tmp_path / "notes", "recipes", "show", "w4a16_g31")
    assert (done.wait(), done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_an_unexpected_error_keeps_its_traceback(run, monkeypatch):
    def broken():
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(catalogue, "descriptions", broken)
    with pytest.raises(ZeroDivisionError):
        run("recipes", "list")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c(model, tmp_path, hears_signals):
    long = ["--calibration", "random", "--samples", 1024, "--sequence-length", 128]
    command = Command(tmp_path / "notes", "export", model, "-o", tmp_path / "out", *long)
    assert command.writes("] quantize ")
    command.send(signal.SIGINT)
    assert command.wait() == 130 and command.stdout == "" and "Traceback" not in command.stderr
    assert command.stderr.splitlines()[-1] == "interrupted"
    assert leftovers(tmp_path) == ["notes"]
