"""The block loop: interrupted runs go on where they stopped, bytes are reproducible, bad numbers are named."""

import json
from unittest.mock import patch

import pytest
import torch
from torch import nn

from helpers import exports
from qexport.api.stages import capturing
from qexport.calibrate import loop
from qexport.errors import InputError, NumericsError
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section

export = exports.exporting.export
CALIBRATION = CalibrationSpec(source="random", samples=4, sequence_length=16, batch_size=2)
RECIPE = Recipe(
    scheme="w8a8_static", lm_head="w8a8_static", weights=section("weights", method="gptq"), smooth=section("smooth"),
    calibration=CALIBRATION,
)  # fmt: skip
BLOCKS = ["prologue", "model.layers.0", "model.layers.1", "epilogue"]


class Stop(Exception):
    pass


def stop_at(block, error=Stop):
    """A progress callback that raises when a block is about to be quantized."""

    def progress(stage, what, done, total):
        if stage == "quantize" and what == block:
            raise error

    return progress


@pytest.fixture
def folder(model_folder):
    return model_folder("llama")


@pytest.fixture
def run(captured, folder, tmp_path):
    """run(out, recipe, **options) exports the small Llama; run.worked are the blocks that it worked on."""
    original = loop._one

    def make(out="out", recipe=RECIPE, **options):
        worked = []

        def counted(graph, block, *rest):
            worked.append(block.name)
            return original(graph, block, *rest)

        with (
            patch.object(capturing, "capture_model", lambda *_, **__: captured("llama")),
            patch.object(loop, "_one", counted),
        ):
            try:
                export(folder, recipe, out_dir=tmp_path / out, **options)
            finally:
                make.worked = worked
        return tmp_path / out

    return make


def data(folder):
    return (folder / "model.onnx.data").read_bytes()


def test_the_same_input_gives_the_same_bytes(run):
    first, second = run("first"), run("second")
    assert run.worked == BLOCKS
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in set(names) - {"report.json"}:  # which tells how long it took
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    reports = [json.loads((folder / "report.json").read_text())["export"] for folder in (first, second)]
    scores = [[block["sqnr_db"] for block in report["blocks"]] for report in reports]
    assert scores[0] == scores[1] and all(score > 10 for score in scores[0][1:3])


@pytest.mark.by_default("2-*")
@pytest.mark.each_value_once
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_an_interrupted_export_goes_on_where_it_stopped(run, tmp_path, block, error):
    whole = run("whole")
    with pytest.raises(error):
        run("parts", progress=stop_at(BLOCKS[block], error))
    assert run.worked == BLOCKS[:block]
    assert not (tmp_path / "parts").exists()
    parts = run("parts", resume=True)
    assert run.worked == BLOCKS[block:]
    assert data(parts) == data(whole)
    assert (parts / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_without_resume_it_starts_again(run):
    with pytest.raises(Stop):
        run(progress=stop_at("model.layers.1"))
    run()
    assert run.worked == BLOCKS


def test_resume_with_nothing_to_go_on_with_starts(run):
    run(resume=True)
    assert run.worked == BLOCKS


@pytest.mark.by_default("recipe")
@pytest.mark.parametrize(
    "other",
    [
        RECIPE.model_copy(update={"weights": section("weights", method="rtn")}),
        RECIPE.model_copy(update={"calibration": CALIBRATION.model_copy(update={"seed": 1})}),
    ],
    ids=["recipe", "calibration"],
)
def test_the_journal_of_another_export_is_refused(run, other):
    with pytest.raises(Stop):
        run(progress=stop_at("model.layers.1"))
    with pytest.raises(InputError, match="holds an export of another model, recipe, calibration, target"):
        run(recipe=other, resume=True)
    run(resume=True)  # and it is still there for its own
    assert run.worked == BLOCKS[2:]


def test_a_journal_line_cut_short_is_a_block_not_done(run, tmp_path):
    whole = run("whole")
    with pytest.raises(Stop):
        run(progress=stop_at("model.layers.1"))
    journal = tmp_path / ".out.work" / "blocks" / loop.JOURNAL
    journal.write_text(journal.read_text()[:-20])
    parts = run(resume=True)
    assert run.worked == BLOCKS[1:]
    assert data(parts) == data(whole)


def test_a_damaged_block_is_named(run, tmp_path):
    with pytest.raises(Stop):
        run(progress=stop_at("model.layers.1"))
    file = tmp_path / ".out.work" / "blocks" / "0001.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="is not a finished block") as caught:
        run(resume=True)
    assert caught.value.place == str(file)


def test_notes_of_the_passes_reach_the_report(run):
    report = json.loads((run() / "report.json").read_text())["export"]
    layer = report["blocks"][1]
    assert set(layer["changed"]) == {"SmoothQuant", "GPTQ", "QuantizeActivations"}
    assert len(layer["changed"]["GPTQ"]) == 7 and len(layer["changed"]["QuantizeActivations"]) == 4
    assert report["float"] == []


# ---- numbers that are none ------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheme, method", [("w8a8_static", "rtn"), ("w4a16_g32", "gptq")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_data_that_is_no_number(tmp_path, scheme, method, value):
    recipe = Recipe(scheme=scheme, weights=section("weights", method=method))
    bad = X.clone()
    bad[1, 3] = value
    with pytest.raises(NumericsError):
        export(Small(), recipe, out_dir=tmp_path / "out", example_inputs=(X,), calibration=[(X,), (bad,)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_activations_that_overflow_name_their_block(captured, folder, tmp_path, method):
    model = captured("llama")
    load = model.weights.load
    name = "model.layers.0.mlp.up_proj.weight"

    class Large:
        def load(self, wanted):
            return load(wanted) * (1e38 if wanted == name else 1)

    model.weights = Large()
    recipe = RECIPE.model_copy(update={"weights": section("weights", method=method), "smooth": None})
    with (
        patch.object(capturing, "capture_model", lambda *_, **__: model),
        pytest.raises(NumericsError) as caught,
    ):
        export(folder, recipe, out_dir=tmp_path / "out")
    assert str(caught.value).startswith("model.layers.0, mul") and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_module_exports_what_it_computes(tmp_path):
    module = Small()
    result = export(module, "w8a8_static", out_dir=tmp_path / "out", example_inputs=(X,), calibration=[(X,)])
    session = exports.open_session(result.folder, result.manifest, threads=1)
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    want = module(X).detach()
    assert (torch.from_numpy(got) - want).abs().max() < 0.03 * want.abs().max()
    assert {entry.kernel for entry in result.manifest.linears} == {"MatMulIntegerToFloat"}
