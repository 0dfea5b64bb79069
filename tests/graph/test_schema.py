import operator

import pytest
import torch
from torch.fx import Graph

from qexport.graph import ops  # noqa: F401  registers the operators
from qexport.graph.schema import bind

aten = torch.ops.aten


@pytest.fixture
def graph():
    return Graph()


def test_positions_keywords_and_defaults_have_names(graph):
    x, y = graph.placeholder("x"), graph.placeholder("y")
    total = bind(graph.call_function(aten.add.Tensor, (x, y), {"alpha": 2}))
    assert (total.self, total.other, total.alpha) == (x, y, 2)
    assert bind(graph.call_function(aten.add.Tensor, (x, y))).alpha == 1
    norm = bind(graph.call_function(aten.layer_norm.default, (x, [8])))
    assert (norm.input, norm.normalized_shape, norm.weight, norm.bias, norm.eps) == (x, [8], None, None, 1e-5)


def test_the_operators_of_the_package_have_schemas_too(graph):
    x = graph.placeholder("x")
    assert vars(bind(graph.call_function(torch.ops.qexport.token_scale.default, (x, 127)))) == {
        "x": x, "qmax": 127, "power": 1.0,
    }  # fmt: skip


def test_an_element_of_a_tuple_and_arithmetic_on_sizes(graph):
    x = graph.placeholder("x")
    assert vars(bind(graph.call_function(operator.getitem, (x, 1)))) == {"source": x, "index": 1}
    assert vars(bind(graph.call_function(operator.floordiv, (x, 2)))) == {"a": x, "b": 2}


def test_what_is_no_call_of_an_operator_is_refused(graph):
    with pytest.raises(TypeError, match="no schema"):
        bind(graph.placeholder("x"))
    with pytest.raises(TypeError, match="lacks other"):
        bind(graph.call_function(aten.add.Tensor, (graph.placeholder("x"),)))
    with pytest.raises(TypeError, match="takes 2 arguments"):
        bind(graph.call_function(operator.add, (1, 2, 3)))
