"""Quantized blocks become one ONNX model."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version

import torch
from torch.fx import GraphModule

from ..calibrate.loop import QuantizedBlock
from ..capture.graph import CapturedModel
from ..graph.edit import get_tensor
from ..quant.concat_tensor import ConcatTensor
from .build import Lowered, build_model
from .fuse_moe import gather_experts
from .fuse_parallel_linears import Merged, merge
from .lowered_block import LoweredBlock
from .moe_form import MoeForm
from .target import LoweringTarget

logger = logging.getLogger(__name__)

Read = Callable[[str], torch.Tensor]


def lower_blocks(captured: CapturedModel, finished: Sequence[QuantizedBlock], target: LoweringTarget) -> Lowered:
    """Gather experts, merge products and rewrite blocks for a target, their graphs in place, and translate them."""
    blocks = [lower_block(item, target, captured.constants) for item in finished]
    return build_model(blocks, captured.inputs, captured.outputs, target, version("qexport"))


def lower_block(item: QuantizedBlock, target: LoweringTarget, constants: Collection[str]) -> LoweredBlock:
    """A quantized block as a target wants it; its graph is changed in place.

    Args:
        constants: names of tensors that are no weights of the checkpoint.
    """
    block = item.block
    dense = gather_experts(block.module, target.why_dense if target.operators.contrib else _no_operator)
    merged = merge(block.module)
    _log(block.name, dense, merged)
    read = _reading(block.module, merged.joined, item.load)
    twin, prompt = target.prompt_twin(block.module), None
    if twin is not None:
        target.rewrite(twin, set(constants))
        prompt = LoweredBlock(block.name, twin, block.inputs, block.outputs, _reading(twin, {}, read))
    target.rewrite(block.module, set(constants))
    return LoweredBlock(block.name, block.module, block.inputs, block.outputs, read, prompt, merged.apart, dense)


def _no_operator(form: MoeForm) -> str:
    return "ONNX has no operator for mixtures of experts"


def _log(block: str, dense: dict[str, str], merged: Merged) -> None:
    """What became one node, and what did not and why."""
    for names in merged.together:
        logger.info("%s: %s are one matmul", block, ", ".join(names))
    for name, why in (dense | merged.apart).items():
        logger.info("%s: %s stays apart: %s", block, name, why)


def _reading(module: GraphModule, joined: Mapping[str, ConcatTensor], read: Read) -> Read:
    """How a tensor of a block is read: its own small ones, those made of several, else what `read` finds."""

    def find(name: str) -> torch.Tensor:
        own = get_tensor(module, name)
        if own.device.type != "meta":
            return own
        return joined[name].make(read) if name in joined else read(name)

    return find
