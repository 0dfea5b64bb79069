"""Blocks run batch after batch: the same numbers as a forward call, and weights dequantized once."""

import torch
from torch.fx import Graph, GraphModule, Interpreter

from qexport.graph.execution import Executor, skipping

aten = torch.ops.aten


def doubled(calls):
    def double(x):
        calls.append(x.shape)
        return 2 * x

    return double


def module(calls):
    """x @ (2 * (2 * w)) + 2 * x: two steps make the weight, and a third call of the same function reads the input."""
    root = torch.nn.Module()
    root.w = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    graph, double = Graph(), doubled(calls)
    x, w = graph.placeholder("x"), graph.get_attr("w")
    once = graph.call_function(double, (w,))
    twice = graph.call_function(double, (once,))
    product = graph.call_function(aten.mm.default, (x, twice))
    graph.output((product, graph.call_function(double, (x,)), twice))
    return GraphModule(root, graph)


def test_what_follows_from_tensors_alone_is_computed_once():
    calls = []
    made = module(calls)
    run = Executor(made)
    assert calls == [(2, 3), (2, 3)]
    for rows in (1, 4):
        x = torch.randn(rows, 2)
        found, expected = run(x), (x @ (4 * made.w), 2 * x, 4 * made.w)
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(found, expected, strict=True))
    assert calls == [(2, 3), (2, 3), (1, 2), (4, 2)]
    assert (
        sum(value is not None for value in run._constants.values()) == 1
    )  # the first step of the weight is not kept beside the second


def test_a_run_for_one_value_computes_nothing_beside_it():
    calls = []
    made = module(calls)
    product = next(node for node in made.graph.nodes if node.target is aten.mm.default)
    seen = {}

    class Watching(Interpreter):
        def run_node(self, node):
            seen[node] = super().run_node(node)
            return seen[node]

    x = torch.randn(3, 2)
    Watching(made).run(x, initial_env=skipping(made.graph, [product]))
    assert torch.equal(seen[product], x @ (4 * made.w))
    assert calls == [(2, 3), (2, 3)]
