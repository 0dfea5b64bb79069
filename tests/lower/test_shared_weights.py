"""A module that is called several times has one set of codes, found from all its uses, and in the file once."""

from math import prod

import onnx
import pytest
import torch
from torch import nn

from helpers import exports
from helpers.random_modules import VOCAB, save_encoder
from helpers.runners import captured_runner, load_weights, padded, tokens
from qexport import validate
from qexport.api.stages.capturing import capture_model
from qexport.calibrate.encoder_inputs import encoder_batch
from qexport.capture.module import capture_module
from qexport.errors import RecipeError
from qexport.graph.edit import get_tensor
from qexport.graph.meta import Meta
from qexport.graph.sites import linears, note_uses
from qexport.plan.model_plan import plan_for
from qexport.quant.formats import Scheme
from qexport.quant.gptq import gptq_quantize
from qexport.quant.hessian import HessianStatistic, factorize
from qexport.quant.metrics import sqnr_db
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.validation.placement import examine

KERNELS = {"w4a16_g32": "MatMulNBits", "w8a8_dyn": "MatMulIntegerToFloat", "w8a8_static": "MatMulIntegerToFloat"}
MASK = padded([6, 2, 9], "right")
WIDTH = 64
GPTQ = {"method": "gptq", "token_norm_power": 0.5}


class Loop(nn.Module):
    """One module, called three times."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = x + self.down(torch.relu(self.up(x)))
        return x


class Between(nn.Module):
    """Layers of their own, and one module that every one of them is followed by."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)) for _ in range(3))
        self.same = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = x + self.same(torch.tanh(layer(x)))
        return x


def recipe_of(scheme, **more):
    spec = CalibrationSpec(source="random", samples=4, sequence_length=16)
    return Recipe(scheme=scheme, accuracy_level=1, calibration=spec, **more)


def codes_in(folder):
    """Names of the tensors of 4 or 8 bits with two dimensions, and their bytes in all."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    bits = {onnx.TensorProto.INT8: 8, onnx.TensorProto.UINT8: 8, onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}
    found = {t.name: prod(t.dims) * bits[t.data_type] // 8 for t in graph.initializer if t.data_type in bits}
    return {name: size for name, size in found.items() if size >= 256}


def agrees(made, feeds, scheme, rows=slice(None)):
    ran, graph = made.in_onnxruntime()(feeds), made.in_pytorch()(feeds)
    want = captured_runner(load_weights(made.captured))(feeds)
    for name in ran:
        got, ours, wanted = (v[name][rows] if v[name].dim() == 3 else v[name] for v in (ran, graph, want))
        if scheme == "w4a16_g32":
            assert (got - ours).abs().max() < 2e-5 * ours.abs().max()
        assert sqnr_db(ours, got) > sqnr_db(wanted, ours) + 10


@pytest.mark.by_default("w8a8_static")
@pytest.mark.parametrize("scheme", KERNELS)
def test_a_layer_that_is_called_again(scheme, tmp_path):
    folder = save_encoder("albert", tmp_path / "model")
    made = exports.export(capture_model(folder), recipe_of(scheme), "cpu", tmp_path / "out")
    names = [entry.name for entry in made.manifest.linears]
    again = [name for name in names if name.endswith("@2")]
    assert len(names) == len(set(names)) == 14 and len(again) == 6
    assert {name.removesuffix("@2") for name in again} < set(names)
    placed, _ = examine(made.folder, made.manifest, made.manifest.provider)
    assert not placed.unfused and {entry.kernel for entry in made.manifest.linears} == {KERNELS[scheme]}
    shapes = {entry.name: entry.shape for entry in made.manifest.linears if entry.name not in again}
    codes = sum(prod(shape) for shape in shapes.values())
    assert sum(codes_in(made.folder).values()) == (codes // 2 if scheme == "w4a16_g32" else codes)
    feeds = encoder_batch(made.captured, tokens(*MASK.shape, vocab=VOCAB), MASK)
    agrees(made, feeds, scheme, MASK.bool())


def sample(*sizes):
    return torch.randn(*sizes, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.by_default("Between-9-*", "Loop-7-w4a16_g32")
@pytest.mark.each_value_once
@pytest.mark.parametrize("scheme", KERNELS)
@pytest.mark.parametrize("kind, uses", [(Loop, 7), (Between, 9)])
def test_a_loop_of_ones_own(kind, uses, scheme, tmp_path):
    torch.manual_seed(0)
    model, x = kind().eval(), sample(2, 5)
    captured = capture_module(model, (x,), None)
    assert len(captured.blocks) == (1 if kind is Loop else 4)
    made = exports.export(captured, recipe_of(scheme), "cpu", tmp_path / "out", calibration=[(x,)])
    names = [entry.name for entry in made.manifest.linears]
    assert len(names) == len(set(names)) == uses
    codes = sum(prod(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear))
    assert sum(codes_in(made.folder).values()) == (codes // 2 if scheme == "w4a16_g32" else codes)
    agrees(made, {"x": x}, scheme)
    report = validate(made.folder, model, inputs=[(x,)], threads=1)
    assert not report.problems and len(report.layers.linears) == uses


def weights_of(made, name):
    """The weight [N, K] that a block computes with, read from its codes [K, N] and scales."""
    module = next(b.module for b in made.blocks if name in {n.meta.get(Meta.LINEAR) for n in b.module.graph.nodes})
    codes, scale = (get_tensor(module, f"{name}.weight_{part}") for part in ("codes", "scale"))
    return (codes * scale.repeat_interleave(len(codes) // len(scale), 0)).t()


def test_codes_suit_all_uses(tmp_path):
    """GPTQ's Hessian is that of every use: codes found by hand from what the three calls read are the same."""
    torch.manual_seed(0)
    model, x = Loop().eval(), sample(4, 40)
    made = exports.export(
        capture_module(model, (x,), None), recipe_of("w4a16_g32", weights=GPTQ), "cpu", tmp_path / "out",
        calibration=[(x,)],
    )  # fmt: skip
    read = []
    hook = model.up.register_forward_hook(lambda _, given, result: read.append(given[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    assert len(read) == 3
    fmt = Scheme.parse("w4a16_g32").weight

    def found(inputs):
        seen = HessianStatistic("token_norm", 0.5)
        for one in inputs:
            seen.update(one.flatten(0, 1))
        return gptq_quantize(model.up.weight.detach(), factorize(seen.total(), 0.01, False), fmt).dequantize()

    deployed = weights_of(made, "up")
    same = (deployed == found(read)).float().mean()
    assert same > 0.999 > (deployed == found(read[:1])).float().mean() + 0.01
    assert not torch.equal(deployed, fmt.round_to_nearest(model.up.weight.detach()).dequantize())


def plan_of(model, x, **more):
    plan, _ = plan_for(capture_module(model, (x,), None), Recipe(**more))
    return {p.name: p for p in plan}


def test_plans_say_what_is_shared_and_what_stays_float():
    x = sample(2, 5)
    plan = plan_of(Between(), x, scheme="w4a16_g32", weights=GPTQ)
    nearest = "rounded to nearest without gptq: several blocks read its weight"
    assert plan["same"].reason == nearest and plan["same"].bytes == WIDTH * WIDTH // 2 + 4 * WIDTH * 2
    assert plan["same@3"].reason == f"{nearest}; reads the codes of its first call"
    assert plan["same@3"].shares == "same" and plan["same@3"].bytes == 0
    assert not plan["layers.1.0"].reason and not plan["layers.1.0"].shares
    plan = plan_of(Loop(), x, scheme="w4a16_g32", weights=GPTQ)
    assert plan["up"].reason == "" and plan["up@2"].reason == "reads the codes of its first call"
    plan = plan_of(Loop(), x, scheme="w8a8_dyn", overrides=[{"match": "up", "scheme": "float"}])
    assert {p.scheme for n, p in plan.items() if n.startswith("up")} == {None}
    assert len([p for n, p in plan.items() if n.startswith("down") and p.scheme is not None]) == 3
    plan = plan_of(Loop(), x, scheme="w4a16_g32", weights={"method": "zq_local"})
    why = "its weight is shared by several linears, and zq_local finds what suits one of them"
    assert plan["up"].reason == plan["up@2"].reason == why and plan["up"].scheme is None
    with pytest.raises(RecipeError, match="matches no linear"):
        plan_of(Loop(), x, scheme="w8a8_dyn", overrides=[{"match": "up@2", "scheme": "float"}])


def test_calls_are_counted_anew_where_blocks_are_put_together():
    blocks = capture_module(Between(), (sample(2, 5),), None).blocks
    graphs = [block.module.graph for block in blocks]
    every = [[linear.name for linear in linears(graph)] for graph in graphs]
    assert sorted(name for names in every for name in names if name.startswith("same")) == ["same", "same@2", "same@3"]
    alone = [graph for graph in graphs if "same@3" in {linear.name for linear in linears(graph)}]
    note_uses(alone)
    (same,) = [linear for linear in linears(alone[0]) if linear.weight == "same.weight"]
    assert same.name == "same" and not {Meta.USE, Meta.READ_ELSEWHERE} & set(same.node.meta)


class TiedHeads(nn.Module):
    """Two modules of one weight, of which a recipe may ask different things."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_two_modules_of_one_weight(tmp_path):
    torch.manual_seed(0)
    model, x = TiedHeads().eval(), sample(2, 5)
    made = exports.export(capture_module(model, (x,), None), recipe_of("w8a8_dyn"), "cpu", tmp_path / "out")
    assert len(made.manifest.linears) == 2 and sum(codes_in(made.folder).values()) == WIDTH * WIDTH
    agrees(made, {"x": x}, "w8a8_dyn")
    names = [p.name for p in plan_for(capture_module(model, (x,), None), Recipe(scheme="w8a8_dyn"))[0]]
    plan = plan_of(model, x, scheme="w8a8_dyn", overrides=[{"match": names[1], "scheme": "w4a16_g32"}])
    assert {p.scheme for p in plan.values()} == {None}
    assert "asks for different schemes" in plan[names[0]].reason


@pytest.mark.by_default("smoothquant")
@pytest.mark.parametrize("smooth", ["smoothquant", "awq"])
def test_factors_leave_shared_weights_alone(smooth, tmp_path):
    """A factor in one use would be in all of them: what the file computes stays the model's."""
    torch.manual_seed(0)
    model, x = Between().eval(), sample(4, 16)
    x[..., 3] *= 30
    recipe = recipe_of("w8a8_static", smooth={"method": smooth, "explicit": True})
    made = exports.export(capture_module(model, (x,), None), recipe, "cpu", tmp_path / "out", calibration=[(x,)])
    codes = sum(prod(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear))
    assert sum(codes_in(made.folder).values()) == codes
    with torch.no_grad():
        (ran,) = made.in_onnxruntime()({"x": x}).values()
        assert sqnr_db(model(x), ran) > 25
