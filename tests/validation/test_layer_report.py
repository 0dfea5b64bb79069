"""What the report says of a layer beside its errors: attentions, ranges, sizes, kernels and time."""

import math

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from qexport.api import measuring
from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.api.validating import validate
from qexport.artifact import manifest as manifests
from qexport.recipe.recipe import Recipe
from qexport.recipe.registry import section
from qexport.runtime.session import open_session
from qexport.validation import worst_linears
from qexport.validation.attentions import attention_results
from qexport.validation.ranges import static_limits
from qexport.validation.reference import decoder_feeds
from qexport.validation.running import run_session, with_outputs
from qexport.validation.text import Text

WINDOW = 40
NUMBERS = {"scale": 0.5, "low": -8.0, "high": 7.0}


@pytest.fixture(scope="module")
def llama(model_folder):
    return model_folder("llama")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 128, (1, WINDOW), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def checked(llama, ids, tmp_path_factory):
    """checked(recipe, **options): (folder, report) of an export, validated on `ids`."""

    def run(recipe, **options):
        folder = tmp_path_factory.mktemp("checked") / "out"
        export(llama, recipe, out_dir=folder, **options)
        with pytest.MonkeyPatch.context() as patch:
            given = lambda *_: Text(ids, "token ids", False)  # noqa: E731
            patch.setattr(measuring, "choose_text", given)
            return folder, validate(folder, llama)

    return run


@pytest.fixture(scope="module")
def static(checked, ids):
    calibration = torch.randint(3, 128, (4, WINDOW), generator=torch.Generator().manual_seed(4))
    return checked("w8a8_static", calibration=calibration)


def deployed(folder, llama, ids, names):
    """Values of the deployed file on `ids`, by name."""
    feeds, manifest = decoder_feeds(capture_model(llama), ids)[0], manifests.load(folder)
    return run_session(open_session(with_outputs(folder, names), manifest), feeds, names)


def test_attention_is_what_the_linear_behind_it_reads(checked, llama, ids):
    folder, report = checked(Recipe(scheme="w4a16_g32", accuracy_level=1))
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    seen, name = [], "model.layers.1.self_attn.o_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        model(ids)
    value = next(entry.input for entry in manifests.load(folder).linears if entry.name == name)
    got = deployed(folder, llama, ids, [value])[value].double()
    row = report.layers.attentions[1]
    assert [r.name for r in report.layers.attentions] == [f"model.layers.{i}.self_attn" for i in range(2)]
    want = 10 * torch.log10(seen[0].square().sum() / (seen[0] - got).square().sum())
    assert row.sqnr_db == pytest.approx(want.item(), abs=1e-2) and row.block == "model.layers.1"
    assert row.own_sqnr_db > 90, "given the deployed q, k and v, the float attention makes the same"


@pytest.mark.slow
def test_a_cache_of_codes_shows_in_attentions_alone(checked):
    _, report = checked(Recipe(scheme="w8a16_g32", kv_cache=section("kv_cache", bits=8)), calibration="random")
    assert all(25 < row.own_sqnr_db < 60 for row in report.layers.attentions)
    assert any("of its own errors model.layers" in sentence for sentence in report.verdict) and not report.problems


@pytest.mark.slow
def test_smoothing_is_not_an_error_of_attention(static):
    _, report = static
    assert all(row.rescaled and row.own_sqnr_db > 90 for row in report.layers.attentions)


@pytest.mark.slow
def test_ranges_and_clipping_are_those_of_the_values(static, llama, ids):
    folder, report = static
    entries = {entry.name: entry for entry in manifests.load(folder).linears}
    limits = static_limits(folder)
    assert len(report.layers.ranges) == 2 * 4, "q, k and v read one value, gate and up another"
    for found in report.layers.ranges:
        value = entries[found.linears[0]].input
        assert {entries[name].input for name in found.linears} == {value}
        got = deployed(folder, llama, ids, [value])[value]
        channels = got.abs().flatten(0, 1).amax(0)
        low, high = limits[value]
        assert (low, high) == pytest.approx((-128 / 127 * high, high))
        assert found.clipped == ((got < low) | (got > high)).sum().item() / got.numel()
        assert found.absmax == pytest.approx(channels.max().item(), rel=1e-5)
        assert found.spread == pytest.approx((channels.max() / channels.median()).item(), rel=1e-5)
        assert found.float_spread > 0 and found.float_absmax > 0
    smoothed = next(found for found in report.layers.ranges if "q_proj" in found.linears[0])
    assert smoothed.float_spread > smoothed.spread, "these models have outliers, which smoothing moves"


def test_a_value_that_the_model_clips_on_one_side_has_no_limits(tmp_path):
    held = {name: onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, (), [size]) for name, size in NUMBERS.items()}
    nodes = [("Div", ["x", "scale"], "a"), ("Clip", ["a", "low"], "b"), ("Clip", ["a", "low", "high"], "c")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, inputs, [output]) for kind, inputs, output in nodes], "clips", [], [],
        list(held.values()),
    )  # fmt: skip
    for last, limits in ((2, {}), (3, {"x": (-4.0, 3.5)})):
        part = onnx.ModelProto(graph=graph)
        del part.graph.node[last:]
        onnx.save(part, tmp_path / "model.onnx")
        assert static_limits(tmp_path) == limits


@pytest.mark.slow
def test_few_bits_have_their_range_too(checked):
    folder, report = checked("fptq", calibration="random")
    assert any(found.clipped is not None for found in report.layers.ranges) and static_limits(folder)


def test_sizes_kernels_and_gains(checked):
    folder, report = checked(Recipe(scheme="w4a16_g32", lorc=section("lorc", rank=4)))
    for row, entry in zip(report.layers.linears, manifests.load(folder).linears, strict=True):
        assert row.bytes == entry.bytes and row.bits == 8 * entry.bytes / math.prod(entry.shape)
        assert (row.kernel, row.provider) == ("MatMulNBits", "CPUExecutionProvider")
        assert 0.1 < row.branch_gain_db < 6 and not row.fault
    rows = worst_linears(report, 3)
    assert len(rows) == 3 and all(isinstance(cell, str) and cell for row in rows for cell in row)


@pytest.mark.by_default("w4a16_g32_rtn")
@pytest.mark.parametrize("recipe", ["w4a16_g32_rtn", "w4a16_g32_int8_prompts"])
def test_time_is_shared_out(checked, recipe):
    folder, report = checked(recipe, calibration="random")
    layers, rows = report.layers, {row.name: row for row in report.layers.linears}
    assert sum(layers.time_by_op.values()) == pytest.approx(1) == sum(layers.step_time_by_op.values())
    kernel = layers.linears[0].kernel
    assert kernel == ("MatMulNBits" if recipe.endswith("rtn") else "MatMulIntegerToFloat"), "as prompts run"
    assert sum(row.time_share for row in layers.linears) == pytest.approx(layers.time_by_op[kernel], abs=1e-6)
    assert sum(row.step_time_share for row in layers.linears) == pytest.approx(layers.step_time_by_op["MatMulNBits"])
    q, k = (rows[f"model.layers.0.self_attn.{n}_proj"].time_share for n in "qk")
    assert q == pytest.approx(2 * k), "one product of 64 and 32 columns (and 32 of v)"
    assert any("% of the time of a prompt" in sentence for sentence in report.verdict)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3", "opt", "phi3"])
def test_attentions_are_found_by_dataflow(captured, family):
    found = {}
    for block in captured(family).blocks:
        found |= attention_results(block.module.graph)
    assert len(found) >= 2 and all(reader.startswith(f"{path}.") for reader, path in found.items())
    assert len({path for path in found.values()}) == len(found)


class Plain(torch.nn.Module):
    """Linears one after the other on 2-D values: what one makes is what the next reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


def test_linears_that_read_inputs_and_each_other(tmp_path):
    torch.manual_seed(0)
    net = Plain().eval()
    inputs = [(torch.randn(20, 64),)]
    export(net, Recipe(scheme="w4a16_g32"), out_dir=tmp_path / "out", example_inputs=inputs[0])
    report = validate(tmp_path / "out", net, inputs=inputs)
    assert not report.problems and [found.linears for found in report.layers.ranges] == [("first",), ("second",)]
    assert report.layers.ranges[0].absmax == report.layers.ranges[0].float_absmax == inputs[0][0].abs().max()
    assert report.layers.time_by_op and not report.layers.step_time_by_op
    assert np.isclose(sum(report.layers.time_by_op.values()), 1)
