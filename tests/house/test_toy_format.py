"""A number format from outside of the package: this file is all there is of it, from its name to its ONNX form.

Powers of two: a 4-bit code is a sign and one of 0, 2^-6, 2^-5 … 1, times the largest magnitude of the group.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.fx import GraphModule, Node

import qexport
from helpers import agreement
from helpers.random_decoders import VOCAB, save_model
from helpers.runners import padded
from helpers.tokenizer_files import write_word_tokenizer
from qexport.errors import RecipeError
from qexport.graph.edit import add_tensor, call, dtype_of, shape_of
from qexport.graph.schema import Arguments
from qexport.graph.views import sizes_of
from qexport.lower.emitter import Emitter
from qexport.lower.registry import translates
from qexport.passes.formats import GraphForm, graph_form
from qexport.quant.formats import ActivationFormat, QuantizedWeight, Scheme, WeightFormat, weight_format
from qexport.quant.formats.base import forget, group_size
from qexport.recipe.recipe import Recipe

TEXT = " ".join(f"w{i * i % 97}" for i in range(300))
LEVELS = (0.0, *(2.0**-e for e in range(6, -1, -1)))
TABLE = torch.tensor([*LEVELS, *(-level for level in LEVELS)])


# 1. Its numbers


@dataclass(frozen=True)
class PowersOfTwo(WeightFormat):
    """`pot4_g{16..1024}`."""

    bits: int = field(default=4, init=False)
    group_size: int = 32
    stem = "pot4"
    options = r"_g(?P<group>\d+)"
    examples = ("pot4_g32",)
    candidates = ("pot4_g32", "pot4_g64")
    interchangeable = True

    @classmethod
    def parse(cls, match: re.Match[str]) -> tuple["PowersOfTwo", ActivationFormat | None]:
        return cls(group_size(match, match["group"])), None

    def scales(self, w: Tensor) -> tuple[Tensor, None]:
        absmax = w.float().reshape(len(w), -1, self.group_size).abs().amax(-1)
        return absmax.masked_fill(absmax == 0, 1), None

    def encode(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        steps = w.float() / scale.repeat_interleave(self.group_size, 1)
        nearest = (steps.abs()[..., None] - torch.tensor(LEVELS)).abs().argmin(-1)
        return (nearest + 8 * (steps < 0)).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return TABLE[codes.long()] * scale.repeat_interleave(self.group_size, 1)


# 2. How it stands in a graph


@torch.library.custom_op("toy::dequantize_pot4", mutates_args=())
def dequantize_pot4(codes: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """The weight [K, N] of codes [K, N] and scale [K / group_size, N]."""
    return TABLE.to(scale.dtype)[codes.long()] * scale.repeat_interleave(group_size, 0)


@dequantize_pot4.register_fake
def _(codes, scale, group_size):
    return scale.new_empty(codes.shape)


@graph_form(PowersOfTwo)
class PowersOfTwoForm(GraphForm):
    operator: ClassVar[Any] = torch.ops.toy.dequantize_pot4.default

    def insert(self, module: GraphModule, name: str, weight: QuantizedWeight, factor: Tensor | None = None) -> Node:
        codes = add_tensor(module.graph, f"{name}.weight_codes", weight.codes.t().contiguous())
        scale = add_tensor(module.graph, f"{name}.weight_scale", weight.scale.t().contiguous())
        arguments = (codes, scale, weight.format.group_size)
        return call(module.graph, self.operator, arguments, like=scale, shape=shape_of(codes))

    def why_not_beside(self, weight: Node) -> str:
        return ""


# 3. What it is in ONNX


@translates(torch.ops.toy.dequantize_pot4.default)
def _translate(emit: Emitter, node: Node, given: Arguments) -> ir.Value:
    (k, n), size = sizes_of(given.codes), given.group_size
    index = emit.cast(emit.tensor(given.codes, bits=4), torch.int32)
    values = emit.op("Gather", emit.constant(TABLE.tolist(), dtype_of(node)), index)
    grouped = emit.op("Reshape", values, emit.constant([k // size, size, n]))
    scaled = emit.op("Mul", grouped, emit.op("Unsqueeze", emit.get(given.scale), emit.constant([1])))
    return emit.op("Reshape", scaled, emit.constant([k, n]))


# And that is all. Other tests do not know it:


@pytest.fixture(scope="module", autouse=True)
def registered():
    weight_format(PowersOfTwo)
    yield
    forget(PowersOfTwo)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_model("llama", tmp_path_factory.mktemp("toy"))
    write_word_tokenizer(made, VOCAB)
    return made


def test_its_values_are_the_nearest():
    w = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = Scheme.parse("POT4_g32").weight.round_to_nearest(w)
    steps = w.view(5, 2, 32) / found.scale[..., None]
    nearest = (steps[..., None] - TABLE).abs().amin(-1)
    off = (found.dequantize() - w).view(5, 2, 32) / found.scale[..., None]
    assert torch.allclose(off.abs(), nearest, atol=1e-6)


def test_the_name_alone_is_a_recipe(folder, run):
    code, out, _ = run("inspect", folder, "-r", "pot4_g32")
    assert code == 0 and "pot4_g32" in out
    recipe = Recipe.load("pot4_g32")
    assert recipe.weights.method == "rtn" and recipe.scheme == "pot4_g32"
    with pytest.raises(RecipeError, match="has groups of 48"):
        Recipe.load("pot4_g48")
    with pytest.raises(RecipeError, match="unknown scheme 'pot4_x'"):
        Recipe.load("pot4_x")


def test_shorter_groups_where_long_ones_do_not_fit():
    scheme, why = Scheme.parse("pot4_g64").fit(96)
    assert scheme == Scheme.parse("pot4_g32") and "groups of 32" in why


@pytest.mark.by_default("cpu")
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_onnxruntime_computes_what_the_graph_does(captured, tmp_path, target):
    recipe = Recipe(scheme="pot4_g32", lm_head="pot4_g32")
    exported = agreement.export(captured("llama"), recipe, target, tmp_path / "out", single=target == "cuda")
    agreement.assert_agree(exported, padded([9, 4, 6], "left"), flips=0)
    linears = exported.manifest.linears
    assert {entry.kernel for entry in linears} == {"MatMul"} and len(linears) == 15
    for entry in linears:
        (n, k), scales = entry.shape, exported.dtype.itemsize
        assert entry.bytes == n * k // 2 + n * k // 32 * scales == Scheme.parse("pot4_g32").bytes(entry.shape, scales)
    # What reads one value is one product, so the constants stood side by side.
    assert Counter(entry.node.rpartition(".")[2] for entry in linears) == {
        "q_proj+k_proj+v_proj": 6, "o_proj": 2, "gate_proj+up_proj": 4, "down_proj": 2, "lm_head": 1,
    }  # fmt: skip


def test_methods_that_move_codes_on_a_grid_say_that_it_has_none(captured, tmp_path):
    recipe = Recipe(scheme="pot4_g32", weights={"method": "hqq"})
    qexport.export(captured("llama"), recipe, out_dir=tmp_path / "out")
    report = (tmp_path / "out" / "report.json").read_text()
    assert report.count('"pot4_g32, rounded to nearest: it is not an integer format"') == 14


def test_an_export_is_valid(folder, tmp_path):
    made = qexport.export(folder, "pot4_g32", out_dir=tmp_path / "out")
    assert {linear.scheme.name for linear in made.plan if linear.scheme} == {"pot4_g32"}
    report = qexport.validate(tmp_path / "out", folder, text=TEXT, windows=2, window=64)
    assert report.placement.kernels == {"MatMul": 14} and report.placement.unfused == () == report.problems
    # Seven powers of two leave relative errors of up to a third in every weight.
    assert all(10 < row.own_sqnr_db < 20 for row in report.layers.linears)


def test_mixed_precision_takes_it_where_it_costs_nothing(tmp_path):
    folder, name = save_model("llama", tmp_path / "model", num_hidden_layers=1), "model.layers.0.mlp.down_proj"
    write_word_tokenizer(folder, VOCAB)
    weights = load_file(folder / "model.safetensors")
    weights[f"{name}.weight"] = Scheme.parse("pot4_g32").weight.rounded(weights[f"{name}.weight"])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    recipe = Recipe(scheme="w4a16_g32", lm_head="w4a16_g32", embedding="w4a16_g32")
    found = qexport.export_auto(
        folder, recipe.with_calibration(samples=2, sequence_length=32), out_dir=tmp_path / "auto", max_kl=0.01,
        text=TEXT, windows=2, window=64, calibration="random",
    )  # fmt: skip
    assert found.schemes[name].startswith("pot4") and found.logits.kl_mean <= 0.01
    assert not found.schemes["model.embed_tokens"].startswith("pot4")  # its rows cannot be looked up
    kernels = {entry.name: entry.kernel for entry in found.export.manifest.linears}
    assert kernels[name] == "MatMul" and kernels["lm_head"] == "MatMulNBits"
    assert qexport.validate(tmp_path / "auto", folder, text=TEXT, windows=2, window=64).problems == ()


def test_two_formats_with_one_name_are_an_error():
    class Other(PowersOfTwo):
        stem = "pot[0-9]"

    with pytest.raises(ValueError, match="Other and PowersOfTwo both read pot4_g32"):
        weight_format(Other)
    with pytest.raises(ValueError, match="has a form already: PowersOfTwoForm"):
        graph_form(PowersOfTwo)(PowersOfTwoForm)
