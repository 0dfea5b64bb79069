"""Next-token distributions of an exported encoder-decoder beside the float model's, on its texts about sources."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...calibrate.data import Prepared
from ...capture.seq2seq import Parts
from ...progress import StageProgress
from ...runtime.seq2seq import EncoderDecoder
from ...validation.logits import compare_logits
from ...validation.reference import FloatOutputs
from ...validation.report import Logits


def deployed_by(pair: EncoderDecoder, sources: Sequence[Mapping[str, Tensor]]) -> Callable[[Tensor], Tensor]:
    """A function from token ids [S] to logits, float32 [S, vocabulary], to be called once for each source, in order.

    The encoder reads the source, and the decoder takes the text token by token.
    """
    start, waiting = len(pair.habits.start), iter(sources)

    def run(ids: Tensor) -> Tensor:
        pair.read({name: tensor.numpy() for name, tensor in next(waiting).items()})
        tokens = ids[None].numpy()
        steps = [tokens[:, :start], *(tokens[:, i : i + 1] for i in range(start, tokens.shape[1]))]
        return torch.cat([torch.tensor(pair.decoder.run(step)[0], dtype=torch.float32) for step in steps])

    return run


def logits_of(
    parts: Parts, pair: EncoderDecoder, sources: Sequence[Mapping[str, Tensor]], written: Prepared,
    progress: StageProgress,
) -> Logits:  # fmt: skip
    """Both models on the float model's texts; the export takes them token by token."""
    texts = torch.cat([batch["input_ids"] for batch in written.batches])
    reference = FloatOutputs(parts.decoder, written.batches, ("logits",), progress)
    tokenizer = parts.encoder.folder.tokenizer() if parts.encoder.folder else None
    try:
        return compare_logits(
            reference, texts, deployed_by(pair, sources), progress, decode=tokenizer and tokenizer.decode
        )
    finally:
        reference.close()
