"""Finished blocks become one ONNX model."""

from collections.abc import Sequence
from importlib.metadata import version

from ..calibrate.loop import Finished
from ..capture.graph import Captured
from .build import Lowered, Piece, Target, build
from .fuse_moe import gather_experts
from .fuse_parallel_linears import merge


def lower(captured: Captured, finished: Sequence[Finished], target: Target) -> Lowered:
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
            prompt = Piece(block.name, item.prompt, block.inputs, block.outputs, item.read_prompt)
        target.rewrite(block.module, set(captured.constants))
        pieces.append(Piece(block.name, block.module, block.inputs, block.outputs, item.read, prompt))
    return build(pieces, captured.inputs, captured.outputs, target, version("qexport"))
