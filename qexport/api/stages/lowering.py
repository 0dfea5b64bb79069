"""Sixth stage: quantized blocks become an ONNX graph for one target; no tensor is written yet."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...lower.attention_plan import deploy_attention, plan_attention
from ...lower.blocks import lower_blocks
from ...lower.build import Lowered
from ...lower.last_token import keep_last
from ...lower.prefill_twin import LONGEST_STEP
from .preparing import timed
from .quantizing import Quantization

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lowering(Quantization):
    """A `Quantization`, and the graph that becomes its file.

    Attributes:
        lowered: the graph, and where to find things in it.
        settings: what a runtime needs to know of it, see `Manifest.settings`.
    """

    lowered: Lowered
    settings: Mapping[str, Any]


@timed
def lower(quantized: Quantization) -> Lowering:
    """Rewrite attention and blocks for the target, and translate them; the graphs of the blocks change.

    Raises:
        LoweringError: an operator has no ONNX form, or something else than the logits of the last token is wanted.
    """
    captured = quantized.captured
    settings, operators = dict(captured.settings), quantized.target.operators
    if not operators.contrib:
        settings |= {"form": quantized.options.form, "opset": operators.opset}
    if quantized.read_last is not None:
        keep_last(captured, quantized.read_last)
        settings["logits"] = "last"
    if captured.kind == "decoder":
        read, e4m3 = quantized.blocks[0].read, quantized.target.e4m3_cache
        grouping = plan_attention(captured, quantized.options.deployed_attention, read, e4m3)
        settings |= deploy_attention(captured, grouping)
        logger.info("attention is %s%s", settings["attention"], f": {grouping}" if isinstance(grouping, str) else "")
    lowered = lower_blocks(captured, quantized.blocks, quantized.target)
    if any(block.prompt is not None for block in lowered.graphs):
        settings["prompts_from"] = LONGEST_STEP + 1
    return Lowering(**vars(quantized), lowered=lowered, settings=settings)
