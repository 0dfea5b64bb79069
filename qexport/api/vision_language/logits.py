"""Next-token distributions of an exported model of pictures and text beside the float one's, on texts about them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...capture.vision_language import VisionParts
from ...errors import InputError
from ...progress import StageProgress
from ...runtime.decoder import Decoder
from ...runtime.vision_language import PicturesAndText
from ...validation.logits import compare_logits
from ...validation.reference import FloatOutputs
from ...validation.report import Logits
from .sources import Example


@dataclass(frozen=True)
class About:
    """What is written about pictures: of every example a text of the same length.

    Attributes:
        examples: one row each.
        starts: see `starts_of`.
        length: tokens of each text, the last one in front of it too.
    """

    examples: Sequence[Example]
    starts: Sequence[int]
    length: int

    @property
    def windows(self) -> Tensor:
        """Their tokens, int64 [examples, length]."""
        pairs = zip(self.examples, self.starts, strict=True)
        return torch.stack([example.input_ids[0, start : start + self.length] for example, start in pairs])


class Behind:
    """Logits of a model on the texts alone: in front of them there is nothing to foretell.

    Args:
        made: its logits of whole prompts.
    """

    def __init__(self, made: FloatOutputs, about: About):
        self._made, self._about = made, about

    def outputs(self, batch: int) -> dict[str, Tensor]:
        start = self._about.starts[batch]
        made = self._made.outputs(batch)
        return {name: value[:, start : start + self._about.length] for name, value in made.items()}


def starts_of(examples: Sequence[Example]) -> list[int]:
    """Where the text about the pictures begins, by prompt: the last token in front of it is the first that counts."""
    return [max(int((~example.written[0]).sum()) - 1, 0) for example in examples]


def about_pictures(examples: Sequence[Example]) -> About:
    """The texts of examples.

    Raises:
        InputError: one has none.
    """
    starts = starts_of(examples)
    length = min(example.input_ids.shape[1] - start for example, start in zip(examples, starts, strict=True))
    if length < 2:
        raise InputError("no text follows a picture", place="text", remedy="Give texts about the pictures")
    return About(examples, starts, length)


def deployed_by(chain: tuple[PicturesAndText, Decoder], about: About) -> Callable[[Tensor], Tensor]:
    """A function from token ids [S] to logits, float32 [S, vocabulary], to be called once for each text, in order.

    The files read the pictures themselves.
    """
    reader, decoder = chain
    waiting = iter(zip(about.examples, about.starts, strict=True))

    def run(_: Tensor) -> Tensor:
        example, start = next(waiting)
        decoder.reset()
        reader.read({name: tensor.numpy() for name, tensor in example.pictures.items()})
        read = example.input_ids[:, : start + about.length].numpy()
        prompt, text = decoder.run(read[:, : start + 1])[0], decoder.run(read[:, start + 1 :])[0]
        return torch.tensor(np.concatenate([prompt[-1:], text]), dtype=torch.float32)

    return run


def logits_of(
    parts: VisionParts, chain: tuple[PicturesAndText, Decoder], about: About, feeds: Sequence[Mapping[str, Tensor]],
    progress: StageProgress,
) -> Logits:  # fmt: skip
    """Both models on the same texts.

    Args:
        feeds: what the float decoder reads of every example.
    """
    made = FloatOutputs(parts.decoder, feeds, ("logits",), progress)
    tokenizer = parts.decoder.origin.tokenizer()
    try:
        return compare_logits(
            Behind(made, about), about.windows, deployed_by(chain, about), progress,
            decode=tokenizer and tokenizer.decode,
        )  # fmt: skip
    finally:
        made.close()
