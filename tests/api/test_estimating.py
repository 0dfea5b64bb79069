"""Time, memory and disk of an export are told before it runs."""

import re

import torch

import qexport
from qexport.api import estimating
from qexport.api.stages import pipeline
from qexport.cost import machine

RECIPE = {"source": "random", "samples": 2, "sequence_length": 16}


def test_inspect_counts_what_calibration_does(model_folder):
    recipe = qexport.Recipe.load("w4a16_g32").with_calibration(**RECIPE)
    found = qexport.inspect(model_folder("llama"), recipe).estimate
    assert found.seconds is None, "too little to measure a machine for"
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 2 * 64 * 96 + 96 * 64
    assert found.work.forward > 3 * 32 * 2 * 2 * layer, "two passes, and one for the Hessians"
    assert found.work.sums == 32 * 2 * (3 * 64**2 + 96**2), "q, k and v share one; the output projection has none"
    rounded = qexport.inspect(model_folder("llama"), "w4a16_g32_rtn").estimate
    assert rounded.work.flops == 0 and rounded.work.moved > 0 and rounded.disk > 0


def test_training_is_counted(model_folder):
    def forward(weights, tune=None):
        recipe = qexport.Recipe.model_validate({"scheme": "w4a16_g32", "weights": weights, "tune": tune})
        recipe = recipe.with_calibration(**RECIPE, batch_size=1)
        return qexport.inspect(model_folder("llama"), recipe).estimate.work.forward

    plain = forward({"method": "gptq"})
    blocks = forward({"method": "autoround", "steps": 8})
    assert blocks == plain / 4 * (3 + 3 * 8 / 2 + 11), "three passes, eight steps of one sequence of two, eleven looks"
    whole = forward({"method": "gptq"}, {"steps": 6, "batches": 1, "check_every": 3})
    assert whole == plain / 4 * (4 + 4 * 6 / 2 + 3 / 8 + 1)


def test_the_command_says_it(model_folder, run):
    code, out, _ = run("inspect", model_folder("llama"), "-r", "w4a16_g32")
    assert code == 0
    assert re.search(r"Its blocks take a few seconds, for 0\.\d+ TFLOP, 0\.0 GB of memory besides the libraries", out)


def test_a_long_export_says_it_first(model_folder, tmp_path, monkeypatch):
    slow, told = machine.Machine(1e6, 1e6), []
    monkeypatch.setattr(estimating, "SHORT", 0)
    monkeypatch.setattr(estimating, "measured", lambda device, **_: slow if device == torch.device("cpu") else None)
    recipe = qexport.Recipe.load("w4a16_g32").with_calibration(**RECIPE)
    for limit in (1e9, 1.0):
        monkeypatch.setattr(pipeline, "LONG", limit)
        qexport.export(
            model_folder("llama"), recipe, out_dir=tmp_path / str(limit),
            progress=lambda stage, what, done, total: told.append((stage, what)),
        )  # fmt: skip
        said = [what for stage, what in told if stage == "estimate"]
        assert len(said) == (limit == 1.0)
    assert said[0].startswith("blocks take about ") and "of disk" in said[0]
    stages = [stage for stage, _ in told]
    assert stages[stages.index("estimate") :].count("quantize") == stages.count("quantize") // 2
