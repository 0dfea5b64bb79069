"""Each part of an exported encoder-decoder between its neighbours: its errors are told by the decoder's logits."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ...artifact import manifest as manifests
from ...artifact.manifest import DECODER, ENCODER
from ...calibrate.fisher import Carried
from ...capture.seq2seq import Parts
from ...mixed_precision.sensitivity import InChain
from ...runtime.session import open_session
from ...validation.reference import rows_of
from ...validation.restoring import Judged, float_logits
from ...validation.running import run_session

Feeds = Mapping[str, Tensor]


def chains_of(
    parts: Parts, folder: Path, sources: Sequence[Feeds], texts: Sequence[Feeds], *, threads: int | None,
    provider: str | None,
) -> dict[str, InChain]:  # fmt: skip
    """By part, how what it makes becomes the logits of texts in the deployed model.

    Gradients are carried from the decoder to the encoder: the decoder's costs have to be found first.

    Args:
        folder: of the export.
        sources: what the encoder reads; texts: what the float decoder reads about them.

    Raises:
        RuntimeProblem: ONNX Runtime refuses a part, does not have the provider, or fails.
    """
    encoder, decoder = (
        open_session(folder / part, manifests.load(folder / part), threads=threads, provider=provider)
        for part in (ENCODER, DECODER)
    )
    # A mask is made of another mask: no rounding changes it.
    made = frozenset(port.name for port in parts.encoder.outputs if port.dtype.is_floating_point)
    names = [name for name in texts[0] if name in made]
    heard = [
        {**text, **{name: value.float() for name, value in run_session(encoder, source, names).items()}}
        for source, text in zip(sources, texts, strict=True)
    ]

    def logits(batch: int, given: Feeds) -> Tensor:
        return run_session(decoder, {**texts[batch], **given}, ["logits"])["logits"].flatten(0, 1)

    wanted, carried = float_logits(parts.decoder, texts), Carried(made, rows_of(texts))
    return {
        DECODER: InChain(carried, heard, Judged(wanted)),
        ENCODER: InChain(carried, sources, Judged(wanted, names, logits)),
    }
