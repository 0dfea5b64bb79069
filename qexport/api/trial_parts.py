"""What `--auto` does alike with models of several files: one budget for all, errors of each measured as deployed."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from ..calibrate.fisher import Carried, Importance
from ..capture.graph import CapturedModel
from ..mixed_precision.allocator import PricedModel, SchemeAllocator
from ..progress import Progress
from ..validation.account import transforms
from ..validation.kl_costs import deployed_costs
from .result import ExportResult
from .stages.preparing import Preparation

PartFeeds = Mapping[str, Sequence[Mapping[str, Tensor]]]


def chooser_of_parts(
    prepared: Preparation, asked: Mapping[str, Preparation], captured: Mapping[str, CapturedModel], feeds: PartFeeds,
    carried: Carried, order: Sequence[str], most: int | None,
) -> SchemeAllocator:  # fmt: skip
    """Price schemes for the linears of all parts, from the last part to the first.

    Args:
        asked: by part, what an export of it works with.
        captured: by part, what is exported.
        feeds: by part, what costs are measured on.
        carried: gradients, as they go from part to part.
        order: of the parts, in which gradients go back.
        most: bytes of all files together; None for any number.

    Raises:
        InputError: so few bytes are not enough.
        RecipeError: the recipe quantizes activations, or nothing.
    """
    told = partial(prepared.options.progress, "costs")
    target = prepared.target
    chooser = SchemeAllocator([
        PricedModel(
            captured[part], asked[part].recipe, target.candidates, target.dtype.itemsize, prepared.options.attention,
            feeds[part], told, carried,
        )
        for part in order
    ])  # fmt: skip
    if most is not None:
        chooser.within_bytes(most)
    return chooser


def costs_of_parts(
    made: ExportResult, captured: Mapping[str, CapturedModel], feeds: PartFeeds, importance: Mapping[str, Importance],
    provider: str | None, progress: Progress,
) -> dict[str, float]:  # fmt: skip
    """What the errors of an export cost in KL by linear, those of each part on what its float one reads.

    Args:
        captured: by part, what was exported.
        feeds: by part, what costs are measured on.
        importance: of the outputs of linears, by name.
        provider: of ONNX Runtime; None for what the files were made for.
    """
    found: dict[str, float] = {}
    for part, result in made.parts.items():
        own = {entry.name: importance[entry.name] for entry in result.manifest.readable if entry.name in importance}
        if own:
            found |= deployed_costs(
                result.folder, result.manifest, captured[part], feeds[part], own,
                transformed=transforms(result.folder), provider=provider, progress=partial(progress, "costs"),
            )  # fmt: skip
    return found
