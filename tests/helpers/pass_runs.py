"""Running passes over all blocks of a captured model, and small modules that put an awkward graph in front of them."""

import torch
from torch import nn

from helpers.runners import load_weights
from qexport.calibrate.block_activations import Stream, batches, collect, make_stream
from qexport.calibrate.sources import Samples
from qexport.capture.graph import CapturedModel
from qexport.capture.module import capture_module
from qexport.passes.base import GraphPass, PassResult, Pipeline
from qexport.plan.linear_plan import LinearPlan, make_plan
from qexport.quant.formats import Scheme


def plan_of(captured: CapturedModel, scheme: str) -> dict[str, LinearPlan]:
    """One scheme for every linear, by linear name."""
    graphs = [(block.name, block.module.graph) for block in captured.blocks]
    return {plan.name: plan for plan in make_plan(graphs, lambda name: Scheme.parse(scheme))}


def stream_of(captured: CapturedModel, ids: torch.Tensor, mask: torch.Tensor, batch_size: int = 2) -> Stream:
    return make_stream(captured, Samples(ids, mask, "tokens of the test"), batch_size)


def run_passes(
    captured: CapturedModel, passes: list[GraphPass], stream: Stream, reference: Stream | None = None
) -> dict[str, dict[str, PassResult]]:
    """Results by block and pass; each block sees what the changed blocks before it make.

    Args:
        reference: the same inputs, to be sent through the float blocks for passes that compare with them.
    """
    results = {}
    for index, block in enumerate(captured.blocks):
        if reference is not None and index < len(captured.blocks) - 1:
            reference.advance(block, index)
        results[block.name] = Pipeline(passes).run(
            block.module,
            lambda module, wanted, block=block: collect(block, stream, module, wanted),
            stream.inputs(block, 0),
            batches(captured, block, stream, reference),
        )
        if index < len(captured.blocks) - 1:
            stream.advance(block, index)
    return results


def block_of(module: nn.Module, width: int = 8) -> torch.fx.GraphModule:
    """The graph of a module that maps [batch, 5, width], with its weights."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    captured = load_weights(capture_module(module, (torch.randn(3, 5, width),)))
    assert len(captured.blocks) == 1
    return captured.blocks[0].module


def collecting(x: torch.Tensor):
    """collect(module, wanted) as a Pipeline takes it, with x for all of the calibration data."""

    def collect(module: torch.fx.GraphModule, wanted: dict) -> dict:
        statistics = {node: factory() for node, factory in wanted.items()}
        _Watch(module, statistics).run(x)
        return statistics

    return collect


class _Watch(torch.fx.Interpreter):
    def __init__(self, module, statistics):
        super().__init__(module)
        self.statistics = statistics

    def run_node(self, node):
        value = super().run_node(node)
        if node in self.statistics:
            self.statistics[node].update(value.flatten(0, -2))
        return value
