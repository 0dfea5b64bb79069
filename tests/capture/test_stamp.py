"""Layers that do the same are traced once, and their blocks are those that tracing every layer makes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaAttention

from helpers.random_decoders import VOCAB, reference_model, save_model
from helpers.runners import captured_runner, load_weights, prompt_feeds, tokens, transformers_runner
from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.capture import trace
from qexport.capture.layer_groups import LayerGroups, find_layers
from qexport.errors import CaptureError

pytestmark = pytest.mark.traced_anew

SLIDING, FULL = "sliding_attention", "full_attention"
KINDS = {  # of each family a config, and the layer that every layer is like
    "llama_bias": ({}, (0, 1, 1, 1)),
    "opt": ({}, (0, 1, 1, 1)),
    "gemma3": ({"layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]}, (0, 1, 2, 1, 1, 2)),
}


@pytest.fixture
def depths(monkeypatch):
    """Numbers of layers that torch.export is given, call by call."""
    seen, export = [], trace._export

    def record(model, cache, *more):
        seen.append(len(cache))
        return export(model, cache, *more)

    monkeypatch.setattr(trace, "_export", record)
    return seen


def same_shape(spec):
    """A spec without the names of its dynamic dimensions."""
    if isinstance(spec, tuple):
        return tuple(map(same_shape, spec))
    return spec and (spec.dtype, tuple(d if isinstance(d, int) else "" for d in spec.shape))


def assert_same_blocks(ours, theirs):
    """Equal but for the names of values; those map one to one."""
    assert [b.name for b in ours.blocks] == [b.name for b in theirs.blocks]
    names = {a.value: b.value for a, b in zip(ours.inputs, theirs.inputs, strict=True)}
    for a, b in zip(ours.blocks, theirs.blocks, strict=True):
        assert [names[n] for n in a.inputs] == b.inputs and a.parameters == b.parameters
        env = {}
        for x, y in zip(a.module.graph.nodes, b.module.graph.nodes, strict=True):
            env[x] = y
            assert x.op == y.op and (x.op == "placeholder" or x.target == y.target)
            assert torch.fx.map_arg((x.args, x.kwargs), env.get) == (y.args, y.kwargs) or x.op == "placeholder"
            assert same_shape(x.meta.get("spec")) == same_shape(y.meta.get("spec"))
            assert x.op != "call_function" or x.meta["module_path"] == y.meta["module_path"]
        assert not set(a.outputs) & set(names)
        names.update(zip(a.outputs, b.outputs, strict=True))
    for a, b in zip([*ours.inputs, *ours.outputs], [*theirs.inputs, *theirs.outputs], strict=True):
        assert (a.name, a.dtype, a.dims, names[a.value]) == (b.name, b.dtype, b.dims, b.value)
    assert (ours.settings, ours.tied, set(ours.constants)) == (theirs.settings, theirs.tied, set(theirs.constants))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes", "kinds"), [
    (name, *given) for name, given in KINDS.items()
], ids=KINDS)  # fmt: skip
def test_stamped_blocks_are_the_traced_ones(tmp_path, monkeypatch, depths, family, changes, kinds):
    folder = save_model(family, tmp_path / "model", num_hidden_layers=len(kinds), **changes)
    found = []
    monkeypatch.setattr(trace, "find_layers", lambda *args: found.append(find_layers(*args)) or found[-1])
    stamped = capture_model(folder)
    monkeypatch.setattr(trace, "find_layers", lambda *args: None)
    traced = capture_model(folder)
    assert found[0].first == kinds and depths == [max(kinds) + 1, len(kinds)]
    assert_same_blocks(stamped, traced)


def assert_computes_what_transformers_computes(folder):
    captured, model = load_weights(capture_model(folder)), reference_model(folder)
    feeds = prompt_feeds(captured, tokens(2, 7, vocab=VOCAB), torch.ones(2, 7, dtype=torch.int64))
    got, want = captured_runner(captured)(feeds)["logits"], transformers_runner(model)(feeds)["logits"]
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_stamped_model_computes_what_transformers_computes(tmp_path, depths):
    assert_computes_what_transformers_computes(save_model("mistral", tmp_path / "model", num_hidden_layers=6))
    assert depths == [2]


@pytest.mark.slow
def test_exports_of_stamped_and_of_traced_blocks_are_the_same_bytes(tmp_path, monkeypatch):
    folder, ids = save_model("llama", tmp_path / "model", num_hidden_layers=4), tokens(2, 16, vocab=VOCAB)
    files = []
    for out in ("stamped", "traced"):
        export(folder, "w8a8_static", out_dir=tmp_path / out, calibration=ids)
        files.append([(tmp_path / out / name).read_bytes() for name in ("model.onnx", "model.onnx.data")])
        monkeypatch.setattr(trace, "find_layers", lambda *args: None)
    assert files[0] == files[1]


@pytest.mark.slow
def test_layer_that_differs_in_a_number_is_traced(tmp_path, monkeypatch, depths):
    init = LlamaAttention.__init__

    def scaled(self, config, layer_idx):
        init(self, config, layer_idx)
        self.scaling *= 0.5 if layer_idx == 3 else 1

    monkeypatch.setattr(LlamaAttention, "__init__", scaled)
    assert_computes_what_transformers_computes(save_model("llama", tmp_path / "model", num_hidden_layers=6))
    assert depths == [4]


@pytest.mark.slow
def test_layers_that_cannot_be_stamped_are_all_traced(tmp_path, monkeypatch, depths):
    folder = save_model("llama", tmp_path / "model", num_hidden_layers=3)
    stamped = capture_model(folder)

    def refuse(*args):
        raise CaptureError("hands on 2 values")

    monkeypatch.setattr(trace, "stamp", refuse)
    assert_same_blocks(stamped, capture_model(folder))
    assert depths == [2, 2, 3]


class Row(torch.nn.Module):
    """Four linears one after another, and what a test does besides."""

    def __init__(self, widths=(8, 8, 8, 8), *, layer=None, between=None):
        super().__init__()
        self.layers = torch.nn.ModuleList(layer(i, n) if layer else torch.nn.Linear(8, n) for i, n in enumerate(widths))
        self.between = between or (lambda i, x: x)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = self.between(i, layer(x)) if i < 3 else layer(x)
        return x


class Step(torch.nn.Module):
    """A linear, and `work` on its result."""

    def __init__(self, index, work):
        super().__init__()
        self.index, self.work, self.linear = index, work, torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.work(self.index, self.linear(x))


def kinds(row) -> LayerGroups | None:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        for module in row.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape), requires_grad=False))
    names = {id(p): n for n, p in row.named_parameters()}

    def run():
        with fake:
            row(torch.empty(2, 8))

    return find_layers(row, [[]] * 4, names, run)


def row_of(work):
    return Row(layer=lambda i, n: Step(i, work))


def test_kinds_of_layers():
    assert kinds(Row()) == LayerGroups("layers", (0, 1, 1, 1))
    assert kinds(row_of(lambda i, x: x * (2.0 if i == 2 else 3.0))).first == (0, 1, 2, 1)
    assert kinds(row_of(lambda i, x: x + torch.tensor([float(i // 2)] * 8))).first == (0, 1, 2, 2)
    assert kinds(row_of(lambda i, x: x.relu() if i % 2 else x)).first == (0, 1, 2, 1)
    row = Row()
    row.layers[3].bias = None
    assert kinds(row).first == (0, 1, 1, 3)


def test_layers_that_share_a_weight_differ_from_those_that_do_not():
    row = Row()
    row.layers[3].weight = row.layers[2].weight
    fake_names = {id(p): n for n, p in row.named_parameters()}
    assert find_layers(row, [[]] * 4, fake_names, lambda: row(torch.empty(2, 8))).first == (0, 1, 1, 3)


def test_what_is_no_plain_row_of_layers_is_not_compared():
    kept = []

    def reach_back(i, x):
        kept.append(x * 2)
        return x + kept[0]

    assert kinds(row_of(reach_back)) is None  # on what another layer made inside
    assert kinds(Row(between=lambda i, x: x * i)) is None  # work between layers
    assert kinds(Row((8, 8, 8))) is None  # not as many layers as caches
    skipping = Row()
    skipping.forward = lambda x: skipping.layers[1](skipping.layers[0](x))
    assert kinds(skipping) is None
    failing = Row()
    failing.forward = lambda x: failing.layers[0](x)[99]
    assert kinds(failing) is None
