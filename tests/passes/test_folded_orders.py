"""Orders of codes folded into the rows of the linears in front: the same numbers, and what cannot be folded is told."""

import pytest
import torch
from torch import nn

from helpers.pass_runs import block_of
from qexport.artifact.feature_order import packed, unpacked
from qexport.artifact.manifest import LinearEntry
from qexport.graph.edit import get_tensor, set_tensor
from qexport.graph.sites import linears
from qexport.models.coded import Given, Order
from qexport.passes.weights.folded_orders import fold_orders
from qexport.quant.formats import IntegerFormat
from qexport.validation.feature_orders import FeatureOrders

FORMAT = IntegerFormat(8, 16)


class Packed(nn.Module):
    """A gated MLP, gate and up in one linear with a bias, every other feature of which is of the gate."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x):
        both = self.both(x)
        return self.down(nn.functional.silu(both[..., ::2]) * both[..., 1::2])


class Chunks(Packed):
    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        return self.down(gate.sigmoid() * gate * up)


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32, bias=False), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.gate(x)) * self.up(x).clamp(-3, 3) * 2)


class Normed(Apart):
    def forward(self, x):
        return self.down(nn.functional.rms_norm(self.gate(x), (32,)))


class ReadTwice(Apart):
    def forward(self, x):
        inner = self.gate(x)
        return self.down(inner.relu()), inner


class Shifted(Apart):
    def forward(self, x):
        return self.down(self.gate(x) + torch.arange(32.0))


class Attended(Apart):
    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (self.gate(x), self.up(x), self.gate(x) * 2))
        return self.down(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def folded(model, keeps=("gate", "up", "both", "down"), ordered=("down",)):
    """The block of a module, codes of its linears, some of them in another order, and what was folded."""
    module = block_of(model, 16)
    random, given = torch.Generator().manual_seed(0), {}
    for linear in linears(module.graph):
        if linear.name in keeps:
            order = Order(torch.randperm(linear.shape[1], generator=random)) if linear.name in ordered else None
            weight = get_tensor(module, linear.weight)
            columns = weight if order is None else weight[:, order.features]
            given[linear.name] = Given(FORMAT.round_to_nearest(columns), order)
    return module, given, fold_orders(module, given)


def run(module, given, x):
    """The block, with the weights of these codes."""
    for linear in linears(module.graph):
        set_tensor(module, linear.weight, given[linear.name].dequantize())
    module.recompile()
    return module.double()(x)[0]


@pytest.mark.parametrize("model", [Packed, Chunks, Apart], ids=lambda model: model.__name__)
def test_the_same_numbers_come_out(model):
    x = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    module, given, done = folded(model())
    order = given["down"].order.features
    assert done.given["down"].order is None and torch.equal(done.inputs["down"], order) and not done.refused
    assert {name: sorted(rows.tolist()) == list(range(len(rows))) for name, rows in done.results.items()} == (
        {"gate": True, "up": True} if model is Apart else {"both": True}
    )
    for name, rows in done.results.items():
        assert torch.equal(done.given[name].weight.codes, given[name].weight.codes[rows])
        assert torch.equal(done.given[name].weight.scale, given[name].weight.scale[rows])
    moved = run(module, done.given, x)
    torch.testing.assert_close(moved, run(block_of(model(), 16), given, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("model", "options", "why"), [
    (Normed, {}, "rms_norm comes from rms_norm.default, not made feature by feature"),
    (ReadTwice, {}, "output reads gate, of which the value is made"),
    (Shifted, {}, "arange comes from arange.default, not made feature by feature"),
    (Attended, {}, "not made feature by feature"),
    (Apart, {"keeps": ("gate", "down")}, "up, which makes it, keeps no codes"),
], ids=["norm", "read twice", "constant", "attention", "float"])  # fmt: skip
def test_what_cannot_be_folded_is_told_why(model, options, why):
    module, given, done = folded(model(), **options)
    assert list(done.refused) == ["down"] and done.refused["down"].endswith(why)
    assert done.given == given and not done.results and not done.inputs


def test_all_readers_take_one_order():
    class Two(Apart):
        def forward(self, x):
            inner = self.gate(x)
            return self.down(inner), self.other(inner)

    model = Two()
    model.other = nn.Linear(32, 8)
    _, _, done = folded(model, keeps=("gate", "down", "other"), ordered=("down", "other"))
    assert done.refused == dict.fromkeys(("down", "other"), "not all that read the value take it in this order")


def test_orders_in_a_manifest():
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).numpy()
    assert (unpacked(packed(order), 300) == order).all()
    rows = torch.randperm(4, generator=torch.Generator().manual_seed(1))
    entry = {"name": "a", "scheme": "w4a16_g32", "node": "n", "kernel": "MatMulNBits", "shape": (4, 300),
             "input": "x", "output": "y", "columns": (2, 6)}  # fmt: skip
    made = LinearEntry(**entry, input_order=packed(order), result_order=packed(rows.numpy()))
    orders, x, y = FeatureOrders([made]), torch.randn(2, 300), torch.randn(2, 8)
    assert torch.equal(orders.in_file("x", x), x[:, order]) and torch.equal(orders.natural("x", x[:, order]), x)
    assert torch.equal(orders.in_file("y", y)[:, 2:6], y[:, 2:6][:, rows]) and orders.natural("z", y) is y
    assert torch.equal(orders.natural("y", orders.in_file("y", y)), y)
    for wrong in ("AAAA", "?", packed(order[:200])):
        with pytest.raises(ValueError, match="no order of 300 features"):
            LinearEntry(**entry, input_order=wrong)
