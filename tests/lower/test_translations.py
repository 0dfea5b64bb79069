import pytest
import torch
from torch.fx import Graph

from qexport.errors import LoweringError
from qexport.graph.edit import TensorSpec
from qexport.lower import ops  # noqa: F401  registers the translations
from qexport.lower.emitter import Emitter
from qexport.lower.registry import is_translated, translate, translates

aten = torch.ops.aten


def test_a_second_translation_of_an_operator_is_an_error():
    with pytest.raises(ValueError, match=r"aten\.cat\.default has a translation already"):
        translates(aten.cat.default)(lambda emit, node, given: emit.constant(0))


def test_a_call_without_a_translation_is_refused_by_name():
    assert is_translated(aten.cat.default) and not is_translated(aten.svd.default)
    graph = Graph()
    with pytest.raises(LoweringError, match=r"aten\.svd\.default has no ONNX translation"):
        translate(Emitter(), graph.call_function(aten.svd.default, (graph.placeholder("x"),)))


def test_arguments_may_be_given_by_keyword():
    emit, graph = Emitter(), Graph()
    emit.enter("block", lambda name: torch.empty(()))
    x = graph.placeholder("x")
    emit.values[x] = emit.constant([1, 2])
    x.meta["spec"] = spec = TensorSpec(torch.int64, (2,))
    clamp = graph.call_function(aten.clamp.default, (x,), {"max": 3})
    clamp.meta["spec"] = spec
    translate(emit, clamp)
    (node,) = emit.nodes
    assert [None if value is None else value.const_value.numpy().tolist() for value in node.inputs] == [[1, 2], None, 3]
