"""Finished blocks become one ONNX model."""

from collections.abc import Sequence
from importlib.metadata import version

from ..calibrate.loop import QuantizedBlock
from ..capture.graph import CapturedModel
from .build import Lowered, build_model
from .fuse_moe import gather_experts
from .fuse_parallel_linears import merge
from .prefill_decode import BlockGraphs
from .target import LoweringTarget


def lower(captured: CapturedModel, finished: Sequence[QuantizedBlock], target: LoweringTarget) -> Lowered:
    """Gather experts, merge products and rewrite finished blocks for a target, in place, and translate them."""
    pieces = []
    for item in finished:
        block = item.block
        item.dense = gather_experts(block.module, target.why_dense)
        merged = merge(block.module)
        item.joined, item.apart = merged.joined, merged.apart
        item.prompt, prompt = target.prompt_twin(block.module), None
        if item.prompt is not None:
            target.rewrite(item.prompt, set(captured.constants))
            prompt = BlockGraphs(block.name, item.prompt, block.inputs, block.outputs, item.read_prompt)
        target.rewrite(block.module, set(captured.constants))
        pieces.append(BlockGraphs(block.name, block.module, block.inputs, block.outputs, item.read, prompt))
    return build_model(pieces, captured.inputs, captured.outputs, target, version("qexport"))
