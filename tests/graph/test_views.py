import pytest
import torch
from torch.fx import Graph

from qexport.graph.edit import TensorSpec
from qexport.graph.schema import bind, rebind
from qexport.graph.views import END, Add, Matmul, MatMulNBits, QuantizeLinear, Slice, results_of, size_at, tensor_name

aten = torch.ops.aten
ops = torch.ops.qexport


@pytest.fixture
def graph():
    return Graph()


def test_a_view_has_the_arguments_of_its_call_and_no_other_call(graph):
    x, scale = graph.placeholder("x"), graph.placeholder("scale")
    node = graph.call_function(ops.quantize_linear.default, (x, scale), {"zero_point": 3, "signed": False})
    assert QuantizeLinear.match(node) == QuantizeLinear.of(node) == QuantizeLinear(x, scale, 3, False)
    assert MatMulNBits.match(node) is Matmul.match(x) is Add.match(2.0) is None
    with pytest.raises(TypeError, match="is no call of qexport.matmul_nbits.default"):
        MatMulNBits.of(node)


def test_the_first_operand_of_aten_is_x_and_defaults_are_filled_in(graph):
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert Matmul.of(graph.call_function(aten.matmul.default, (x, y))) == Matmul(x, y)
    total = Add.of(graph.call_function(aten.add.Tensor, (x, 1.5)))
    assert (total.operands, total.alpha) == ((x, 1.5), 1)
    assert Slice.of(graph.call_function(aten.slice.Tensor, (x, 1))).bounds == (0, END)


def test_arguments_are_written_by_name(graph):
    x, y, z = (graph.placeholder(name) for name in "xyz")
    node = graph.call_function(aten.add.Tensor, (x, y), {"alpha": 2})
    rebind(node, other=z)
    assert (node.args, node.kwargs) == ((x, z), {"alpha": 2})
    softmax = graph.call_function(aten.softmax.int, (x, -1, torch.float32))
    rebind(softmax, dtype=None)
    assert bind(softmax).dim == -1 and bind(softmax).dtype is None
    with pytest.raises(TypeError, match="has no argument beta"):
        rebind(node, beta=1)


def test_what_is_not_known_is_not_guessed(graph):
    x = graph.placeholder("x")
    x.meta["spec"] = TensorSpec(torch.float32, ("batch", 8))
    assert size_at(x, -1) == 8
    with pytest.raises(TypeError, match="axis 0 of x has a dynamic size: batch"):
        size_at(x, 0)
    with pytest.raises(TypeError, match="x reads no tensor"):
        tensor_name(x)
    graph.output((x, 1))
    with pytest.raises(TypeError, match="returns values of nodes"):
        results_of(graph)
