"""Modules by name, with several dynamic dimensions and nested results; what no graph can hold is refused in a line."""

import pytest
import torch
from torch import nn

from helpers.exports import export
from helpers.runners import captured_runner, load_weights
from qexport.capture.module import capture_module
from qexport.errors import CaptureError, InputError
from qexport.recipe.recipe import Recipe


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x, scale, *, shift=None):
        y = self.first(x) * scale
        y.mul_(2)  # into an intermediate
        if shift is not None:
            y = y + shift
        return {"rows": (self.second(y), torch.relu_(y.clone())), "mean": y.mean(1), "unused": None}


def inputs(batch, length, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, length, 8, generator=random), "scale": torch.randn(8, generator=random),
        "shift": torch.randn(batch, length, 8, generator=random),
    }  # fmt: skip


AXES = {"x": {0: "batch", 1: "length"}, "shift": {0: "batch", 1: "length"}}


@pytest.mark.parametrize("batch", [1, 2])
def test_nested_results_and_inputs_by_name(batch):
    model = Nested()
    captured = load_weights(capture_module(model, inputs(batch, 4), AXES))
    assert {p.name: p.dims for p in captured.inputs} == {
        "x": ("batch", "length", 8), "scale": (8,), "shift": ("batch", "length", 8)
    }  # fmt: skip
    assert {p.name: p.dims for p in captured.outputs} == {
        "rows_0": ("batch", "length", 8), "rows_1": ("batch", "length", 8), "mean": ("batch", 8)
    }  # fmt: skip
    for other in (inputs(1, 1), inputs(3, 7)):
        with torch.no_grad():
            want = model(**other)
        got = captured_runner(captured)(other)
        for wanted, name in ((want["rows"][0], "rows_0"), (want["rows"][1], "rows_1"), (want["mean"], "mean")):
            assert torch.allclose(got[name], wanted, atol=1e-6)


def test_shared_weights_stay_one_tensor():
    captured = capture_module(Nested(), inputs(2, 4), AXES)
    names = {name for block in captured.blocks for name in block.parameters}
    assert len({captured.load(name).data_ptr() for name in names if "weight" in name}) == 1


@pytest.mark.parametrize(
    ("given", "axes", "message"),
    [
        ({"x": torch.zeros(2, 8), "y": torch.zeros(2)}, {"z": {0: "batch"}}, "no input is called z"),
        ({"x": torch.zeros(2, 8)}, {"x": {2: "batch"}}, "x has no dimension 2"),
        ({"x": torch.zeros(2, 8)}, {"x": {0: 5}}, "'5' is no name for dimension 0 of x"),
        ((torch.zeros(2, 8), torch.zeros(2)), None, "2 inputs, but forward has 1"),
        ((3,), None, "is not a tensor"),
        ((), None, "there are none"),
    ],
)
def test_inputs_and_dimensions_that_are_not_there(given, axes, message):
    with pytest.raises(InputError, match=message):
        capture_module(nn.Sequential(nn.Linear(8, 8)), given, axes)


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return -x


class Item(nn.Module):
    def forward(self, x):
        return x * x.max().item()


class Loop(nn.Module):
    def forward(self, x):
        for _ in range(int(x.argmax())):
            x = x + 1
        return x


class Picks(nn.Module):
    def forward(self, x):
        return x[x > 0]


class Numpy(nn.Module):
    def forward(self, x):
        return x + torch.from_numpy(x.numpy())


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Remembers(Counts):
    def forward(self, x):
        self.seen.append(x)
        return x + 1


class Keeps(Counts):
    def forward(self, x):
        self.last = x * 2
        return self.last


class Memo(Counts):
    """Remembers what it computes of its weights in the first call, as timm's LeViT does."""

    def __init__(self, of_input=False):
        super().__init__()
        self.weight, self.memo, self.of_input = nn.Parameter(torch.randn(4)), {}, of_input

    def forward(self, x):
        if "cpu" not in self.memo:
            self.memo["cpu"] = self.weight[[1, 0, 3, 2]] + (x[0] if self.of_input else 0)
        return x * self.memo["cpu"]


def test_what_a_first_call_remembers_of_weights_is_a_constant():
    model, x = Memo(), torch.randn(2, 4)
    captured = capture_module(model, (x,))
    assert not model.memo, "the module is left as it was"
    got = captured_runner(load_weights(captured))({"x": x})["output"]
    assert torch.equal(got, model(x)) and list(model.memo) == ["cpu"]
    with pytest.raises(CaptureError, match="forward changes self.memo"):
        capture_module(Memo(of_input=True), (x,))


class Buffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.total.add_(1)
        return x * self.total


class Input(nn.Module):
    def forward(self, x):
        x.mul_(2)
        return x + 1


class Unrolled(nn.Module):
    def forward(self, x):
        return torch.stack([row * 2 for row in x])


REFUSED = {
    Branch: ("control flow depends on the value of a tensor", "if x.sum() > 0:", "torch.where"),
    Item: ("needs the value of a tensor", "return x * x.max().item()", "instead of the number"),
    Loop: ("control flow depends on the value", "for _ in range(int(x.argmax())):", "loop counts"),
    Picks: ("size depends on values", "return x[x > 0]", "torch.where or a mask"),
    Numpy: ("numpy", "return x + torch.from_numpy(x.numpy())", "instead of NumPy's"),
    Counts: ("forward changes self.calls", "self.calls += 1", "Return it as an output"),
    Remembers: ("forward changes self.seen", "self.seen.append(x)", "Return it as an output"),
    Keeps: ("forward changes self.last", "self.last = x * 2", "Return it as an output"),
    Buffer: ("forward writes into total", "self.total.add_(1)", "take it as an input"),
    Input: ("forward writes into x", "x.mul_(2)", "take it as an input"),
    Unrolled: ("dimension 0 (batch) of x is always 3", "", "a loop over that size"),
}


@pytest.mark.by_default("Input", "Buffer")
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_no_graph_can_hold_is_refused_with_the_line_that_does_it(kind, capfd):
    why, line, remedy = REFUSED[kind]
    with pytest.raises(CaptureError) as caught:
        capture_module(kind(), (torch.randn(3, 4),))
    text = str(caught.value)
    assert why in text and remedy in text and "\n" not in text
    assert f"{__file__}:" in text and text.split(f"{__file__}:")[1].partition(": ")[2].startswith(line) or not line
    assert capfd.readouterr().err == ""  # PyTorch prints half a graph


def test_the_module_is_left_as_it_was():
    model = Counts().train()
    with pytest.raises(CaptureError):
        capture_module(model, (torch.randn(3, 4),))
    assert model.training and model.calls == 0 and not model._forward_hooks


def test_every_part_of_the_module_keeps_its_own_mode():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout()).train()
    model[1].eval()
    x = torch.randn(3, 4)
    captured = capture_module(model, (x,))
    captured.witness.run(captured.witness.feeds[0])
    assert [part.training for part in model.modules()] == [True, True, False, True]
    assert model[1].num_batches_tracked == 0


class Odd(nn.Module):
    """What models of public libraries write, and torch.export or ONNX take otherwise."""

    def __init__(self):
        super().__init__()
        self.first, self.steps = nn.Linear(8, 8), nn.Parameter(torch.arange(8.0))

    def forward(self, x, mask):
        torch._check(mask.sum().item() >= 0)  # of values; it computes nothing
        rows = torch.cat([torch.empty(0), self.first(x)], dim=-2)  # in front nothing, of one axis
        place = nn.functional.linear(rows.softmax(-1), self.steps)  # without an axis for its one row
        seen = mask[:, None, None, :].bool()  # the same for every query
        heads = rows.view(len(x), -1, 2, 4).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=seen)
        return out.transpose(1, 2).reshape(len(x), -1, 8) + place[..., None]


def test_odd_ways_of_writing_keep_sizes_free_and_run(tmp_path):
    model, axes = Odd().eval(), {"x": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}

    def given(batch, length):
        random = torch.Generator().manual_seed(length)
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[:, length // 2 + 1 :] = 0
        return {"x": torch.randn(batch, length, 8, generator=random), "mask": mask}

    captured = capture_module(model, given(2, 4), axes)
    assert [port.dims for port in captured.outputs] == [("batch", "length", 8)]
    file = export(captured, Recipe(scheme="float"), "cpu", tmp_path / "odd").in_onnxruntime()
    for batch, length in ((1, 1), (3, 7)):
        feeds = given(batch, length)
        with torch.no_grad():
            want = model(**feeds)
        assert torch.allclose(captured_runner(load_weights(captured))(feeds)["output"], want, atol=1e-6)
        assert torch.allclose(file(feeds)["output"], want, atol=1e-5)
