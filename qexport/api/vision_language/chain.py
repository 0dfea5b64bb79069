"""Each part of an exported model of pictures and text between the others: logits of texts tell its errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from torch.nn.functional import pad

from ...artifact import manifest as manifests
from ...artifact.manifest import DECODER, EMBEDDING, PICTURE_PARTS, VISION
from ...calibrate.fisher import Carried, felt
from ...capture.graph import CapturedModel
from ...capture.vision_language import FEATURES, VisionParts
from ...errors import InputError
from ...mixed_precision.sensitivity import InChain
from ...runtime.session import open_session
from ...validation.restoring import Judged, float_logits
from ...validation.running import run_session
from .sources import Example

Feeds = Mapping[str, Tensor]


def chains_of(
    parts: VisionParts, folder: Path, examples: Sequence[Example], feeds: Mapping[str, Sequence[Feeds]], *,
    threads: int | None, provider: str | None,
) -> dict[str, InChain]:  # fmt: skip
    """Of the decoder and of the encoder of pictures, how what they make becomes the logits of texts when deployed.

    Gradients are carried from the decoder over the embedding to the encoder: costs have to be found in this order.

    Args:
        folder: of the export.
        feeds: what the float parts read of the examples, by part.

    Raises:
        RuntimeProblem: ONNX Runtime refuses a part, does not have the provider, or fails.
    """
    sessions = {
        part: open_session(folder / part, manifests.load(folder / part), threads=threads, provider=provider)
        for part in PICTURE_PARTS
    }
    carried = carried_of(parts, examples)
    rows = [counted(example) for example in examples]
    merged = [port.name for port in parts.embedding.outputs if port.dtype.is_floating_point]

    def read(batch: int, features: Tensor) -> dict[str, Tensor]:
        given = {**feeds[EMBEDDING][batch], FEATURES: features.float()}
        made = run_session(sessions[EMBEDDING], given, merged)
        return {**feeds[DECODER][batch], **{name: value.float() for name, value in made.items()}}

    def logits(batch: int, given: Feeds) -> Tensor:
        made = run_session(sessions[DECODER], read(batch, given[FEATURES]), ["logits"])
        return made["logits"][rows[batch]]

    pictures = feeds[VISION]
    heard = [read(i, run_session(sessions[VISION], given, [FEATURES])[FEATURES]) for i, given in enumerate(pictures)]
    whole = zip(float_logits(parts.decoder, feeds[DECODER]), rows, strict=True)
    wanted = [value[counts.flatten()] for value, counts in whole]
    return {
        DECODER: InChain(carried, heard, Judged(wanted, logits=lambda batch, made: made["logits"][rows[batch]])),
        VISION: InChain(carried, pictures, Judged(wanted, [FEATURES], logits)),
    }


def carried_of(parts: VisionParts, examples: Sequence[Example]) -> Carried:
    """Gradients of the likelihood of texts, not yet found.

    Raises:
        InputError: there are no texts.
    """
    names = {FEATURES, *(port.name for port in parts.embedding.outputs)}
    rows = [counted(example) for example in examples]
    if not (tokens := sum(int(counts.sum()) for counts in rows)):
        raise InputError("no text follows a picture", place="text", remedy="Give texts about the pictures")
    return Carried(frozenset(names), tokens, rows)


def counted(example: Example) -> Tensor:
    """Which rows of logits foretell what is written about pictures; bool [batch, sequence]."""
    return pad(example.written[:, 1:], (0, 1))


def carry_through(captured: CapturedModel, feeds: Sequence[Feeds], carried: Carried) -> None:
    """Carry gradients from what a part makes to what it reads."""
    for _ in felt(captured, feeds, carried=carried):
        pass
