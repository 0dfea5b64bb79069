"""`inspect` with calibration shows the decisions that an export takes from ranges, and an export takes them so."""

import json
import math
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import qexport
from helpers import exports
from helpers.agreement import assert_agree
from helpers.pass_runs import stream_of
from helpers.random_decoders import save_model
from helpers.runners import captured_runner, load_weights, padded, prompt_feeds, tokens
from qexport import cli
from qexport.api.compressing import compressed, compressed_sites
from qexport.api.stages.capturing import capture_model
from qexport.calibrate.ranges import float_ranges
from qexport.errors import InputError, NumericsError
from qexport.graph.edit import get_tensor, is_call
from qexport.graph.sites import fold_sites
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe
from qexport.recipe.registry import section

ops = torch.ops.qexport
RANDOM = CalibrationSpec(source="random", samples=4, sequence_length=16, batch_size=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A llama whose linears read about 4 (o_proj), 15 (the norms) and 120 (down_proj) at most, in both layers."""
    folder = save_model("llama", tmp_path_factory.mktemp("wide"))
    weights = load_file(folder / "model.safetensors")
    for layer in range(2):
        weights[f"model.layers.{layer}.mlp.up_proj.weight"] *= 8
        weights[f"model.layers.{layer}.mlp.down_proj.weight"] /= 8
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def recipe(model):
    """Bounds in the middle of the gaps between what was observed."""
    found = qexport.inspect(model, Recipe(scheme="w4a8_g32_int", calibration=RANDOM), calibrate=True)
    reached = {"o_proj": [], "gate_proj": [], "q_proj": [], "down_proj": []}
    for site in found.sites[:-1]:
        reached[site.linears[0].rpartition(".")[2]].append(site.range)
    norms = reached["q_proj"] + reached["gate_proj"]
    low = math.sqrt(max(reached["o_proj"]) * min(norms))
    high = math.sqrt(max(norms) * min(reached["down_proj"]))
    assert max(reached["o_proj"]) * 1.5 < low < min(norms) / 1.5 and max(norms) * 1.5 < high
    policy = section("fptq", static_up_to=low, dynamic_from=high)
    return Recipe(name="wide", scheme="w4a8_g32_int", calibration=RANDOM, fptq=policy)


@pytest.fixture(scope="module")
def inspected(model, recipe):
    return qexport.inspect(model, recipe, calibrate=True)


DECISIONS = {
    "q_proj": "equalized, static per-tensor", "o_proj": "static per-tensor",
    "gate_proj": "equalized, static per-tensor", "down_proj": "dynamic per-token",
}  # fmt: skip


def test_ranges_are_those_of_the_whole_float_model(captured):
    ids, mask = tokens(5, 9), padded([9, 4, 6, 1, 8], "left")
    model, whole = captured("llama"), load_weights(captured("llama"))
    wanted = {b.name: [s.value for s in fold_sites(b.module.graph)] for b in model.blocks}
    found = float_ranges(model, stream_of(model, ids, mask), wanted)

    seen = {}
    for block in whole.blocks:  # the same values, caught in the whole model at once
        names = {s.value.name for s in fold_sites(block.module.graph)}
        block.module.forward = spying(block.module, names, seen)
    captured_runner(whole)(prompt_feeds(whole, ids, mask))
    want = {name: value[mask.bool()].abs().max().item() for name, value in seen.items()}
    got = {value.name: reach for values in found.values() for value, reach in values.items()}
    assert got.keys() == want.keys() and len(got) == 9
    assert got == pytest.approx(want, rel=1e-5)


def spying(module, names, seen):
    class Spy(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if node.name in names:
                seen[node.name] = value
            return value

    return lambda *inputs: Spy(module).run(*inputs)


def test_one_block_at_a_time_is_in_memory_and_none_behind_the_last_one_asked_about(captured):
    model, ids = captured("llama"), tokens(2, 6)
    wanted = {b.name: [s.value for s in fold_sites(b.module.graph)] for b in model.blocks[:2]}
    steps, loaded, load = [], [], model.load

    def loading(name):
        (owner,) = (b for b in model.blocks if name in b.parameters)
        others = [b for b in model.blocks[:2] if b is not owner and b.name in loaded]
        assert all(get_tensor(b.module, n).device.type == "meta" for b in others for n in b.parameters)
        loaded.append(owner.name)
        return load(name)

    model.load = loading
    float_ranges(model, stream_of(model, ids, torch.ones_like(ids)), wanted, lambda *step: steps.append(step))
    assert set(loaded) == {"prologue", "model.layers.0"}
    assert steps == [("prologue", 0, 2), ("model.layers.0", 1, 2), ("", 2, 2)]
    assert all(get_tensor(b.module, n).device.type == "meta" for b in model.blocks[:2] for n in b.parameters)


def test_without_calibration_the_decision_is_open(model, recipe):
    found = qexport.inspect(model, recipe)
    low, high = f"{recipe.fptq.static_up_to:g}", f"{recipe.fptq.dynamic_from:g}"
    said = f"decided by calibration: static up to {low}, equalized to {high}, per token from there"
    assert {a for n, a in found.activations.items() if n != "lm_head"} == {said}
    assert found.activations["lm_head"] == "float" and found.calibration == ""
    assert all(site.range is None and site.decision is None and site.reason == "" for site in found.sites)
    assert found.calibrates and found.smooths


def test_calibration_decides_every_site(inspected, recipe):
    found = inspected
    assert found.calibration == "4 sequences of 16 random tokens (seed 0)"
    *decided, head = found.sites
    assert head.linears == ("lm_head",) and head.range is None and head.decision is None
    assert len(decided) == 8
    for site in decided:
        assert site.decision.what == DECISIONS[site.linears[0].rpartition(".")[2]]
        assert site.reason.startswith(f"range {site.range:.4g} ") and site.reason.endswith(site.decision.what)
    inputs = {name.rpartition(".")[2]: said for name, said in found.activations.items()}
    assert inputs["q_proj"] == inputs["k_proj"] == inputs["gate_proj"] == "int8 static, equalized"
    assert (inputs["o_proj"], inputs["down_proj"], inputs["lm_head"]) == ("int8 static", "int8 per token", "float")
    again = json.loads(json.dumps(found.as_dict()))
    down = next(s for s in again["sites"] if s["linears"] == ["model.layers.1.mlp.down_proj"])
    assert down["decision"] == "dynamic per-token" and down["range"] > recipe.fptq.dynamic_from
    assert again["linears"][0]["activation"] == "int8 static, equalized" and "activations" not in again


def test_layers_are_one_line_only_where_decisions_agree(model, recipe, inspected):
    assert [len(group) for *_, group in compressed_sites(inspected.sites)] == [2, 2, 2, 2, 1]
    first, second = (s.range for s in inspected.sites if s.linears[0].endswith("down_proj"))
    halved = section("fptq", static_up_to=0, dynamic_from=math.sqrt(first * second))
    between = recipe.model_copy(update={"fptq": halved})
    found = qexport.inspect(model, between, calibrate=True)
    apart = [name for _, name, _ in compressed_sites(found.sites) if "down_proj" in name]
    assert apart == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    apart = [name for _, name, _ in compressed(found.linears, found.activations) if "down_proj" in name]
    assert apart == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_every_recipe_with_quantized_activations_shows_ranges(model):
    overrides = (Override(match="*.0.*.o_proj", scheme="float"),)
    mixed = Recipe(scheme="w8a8_static", calibration=RANDOM, overrides=overrides)
    found = qexport.inspect(model, mixed, calibrate=True)
    known = {s.linears[0]: s.range is not None for s in found.sites}
    assert not known.pop("model.layers.0.self_attn.o_proj") and not known.pop("lm_head") and all(known.values())
    assert all(s.decision is None for s in found.sites)
    assert found.activations["model.layers.1.self_attn.o_proj"] == "int8 static"
    assert found.activations["model.layers.0.self_attn.o_proj"] == "float"
    nothing = qexport.inspect(model, Recipe(scheme="w4a16_g32", calibration=RANDOM), calibrate=True)
    assert nothing.calibration == "nothing was run, because no activation is quantized"
    assert all(s.range is None for s in nothing.sites)


def test_a_module_is_inspected_on_the_inputs_given(recipe):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 32))
    inputs = [(torch.randn(2, 5, 32),) for _ in range(3)]
    found = qexport.inspect(module, recipe, calibration=inputs, example_inputs=inputs[0])
    with torch.no_grad():
        want = max(module[0](x).abs().max().item() for (x,) in inputs)
    assert found.sites[0].range == pytest.approx(want, rel=1e-5)
    with pytest.raises(InputError, match="no text"):
        qexport.inspect(module, recipe, calibrate=True, example_inputs=inputs[0])


def test_weights_that_are_not_finite_are_named(model, recipe, tmp_path):
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    qexport.inspect(tmp_path, recipe)
    with pytest.raises(NumericsError, match="up_proj"):
        qexport.inspect(tmp_path, recipe, calibrate=True)


def test_an_export_decides_the_same_and_runs_so(model, recipe, inspected, tmp_path):
    exported = exports.export(capture_model(model), recipe, "cpu", tmp_path / "out")
    blocks = json.loads((tmp_path / "out" / "report.json").read_text())["export"]["blocks"]
    notes = {site: (what, data) for b in blocks for site, what, data in b["changed"].get("FPTQ", [])}
    sites = [s for s in inspected.sites if s.decision]
    assert {n: data["decision"] for n, (_, data) in notes.items()} == {
        ", ".join(s.linears): s.decision.what for s in sites
    }
    first = [s for s in sites if s.block == "model.layers.0"]  # no quantized block is in front of it
    for site in first:
        what, data = notes[", ".join(site.linears)]
        assert data["range"] == pytest.approx(site.range, rel=1e-6) and what.startswith(site.reason)

    layers = [b.module for b in exported.blocks if b.name.startswith("model.layers")]
    assert [sum(is_call(n, ops.token_scale.default) for n in m.graph.nodes) for m in layers] == [1, 1]
    assert [sum(is_call(n, ops.quantize_linear.default) for n in m.graph.nodes) for m in layers] == [4, 4]
    for mask in (padded([6], "left"), padded([9, 4, 6], "left")):
        assert_agree(exported, mask, 0.02)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> stdout."""

    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["qexport", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code, capsys.readouterr().err
        return capsys.readouterr().out

    return run_command


def test_on_the_command_line(model, recipe, run, tmp_path):
    file = tmp_path / "wide.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert "decided by calibration: static up to" in run("inspect", model, "-r", file)

    out = run("inspect", model, "-r", file, "--calibrate")
    assert "decided by calibration" not in out and "4 sequences of 16 random tokens" in out
    (line,) = (x for x in out.splitlines() if "down_proj" in x and "dynamic per-token" in x)
    assert line.startswith("model.layers.[0-1].mlp.down_proj") and f">= {recipe.fptq.dynamic_from:g}" in line
    assert "Ranges are the float model's" in out

    out = run("inspect", model, "-r", file, "--calibration", "random", "--samples", 2, "--seed", 5, "--json")
    found = json.loads(out)
    assert found["calibration"] == "2 sequences of 16 random tokens (seed 5)"
    assert {s["linears"][0].rpartition(".")[2]: s["decision"] for s in found["sites"][:-1]} == DECISIONS
