"""The text that both models read."""

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..calibrate.own_text import own_text
from ..calibrate.sources import load_samples, text_windows
from ..capture.graph import CapturedModel
from ..errors import InputError
from ..progress import StageProgress
from ..recipe.recipe import CalibrationSpec

# Of text that the model writes: another one than any recipe's, so that nothing is judged on what it was calibrated on.
OWN_SEED = 0x5EED0F7E57


@dataclass(frozen=True)
class Text:
    """Windows of tokens that do not overlap.

    Attributes:
        windows: int64 [n, S].
        described: what they are, for reports.
        own: the model wrote them, or chance did.
    """

    windows: Tensor
    described: str
    own: bool


def choose_text(
    captured: CapturedModel,
    text: str | os.PathLike | None,
    windows: int,
    window: int,
    progress: StageProgress,
) -> Text:
    """The first windows of a text, or what the float model writes when there is none.

    Args:
        text: a path, or a string: the path of a UTF-8 file when there is one of that name, else the text itself.
        windows: how many to take; fewer where the text is shorter.
        window: tokens in each, with the special tokens that the tokenizer puts before a text.

    Raises:
        InputError: no such file, not UTF-8, no text in it, fewer tokens than one window, a window longer than the model
            reads, or no tokenizer.
    """
    if windows < 1 or window < 2:
        raise InputError(
            f"{windows} windows of {window} tokens predict nothing", remedy="Use 1 window of 2 tokens or more"
        )
    tokenizer = captured.folder.tokenizer() if captured.folder else None
    longest = getattr(captured.folder.config, "max_position_embeddings", None) if captured.folder else None
    if longest and window > longest:
        raise InputError(
            f"a window of {window} tokens is longer than the {longest} that the model reads", place="window"
        )
    if text is None:
        return _own(captured, tokenizer, windows, window, progress)
    content, name = _read(text)
    if tokenizer is None:
        raise InputError("text needs a tokenizer, and the reference has none", place=name, remedy="Give no text")
    found = text_windows(content, tokenizer, window, place=name, remedy="Give more text or a smaller window")
    taken = found[:windows]
    fewer = "" if len(taken) == windows else f" (no more in it; {windows} asked for)"
    return Text(taken, f"the first {len(taken)} windows of {window} tokens of {name}{fewer}", False)


def _read(text: str | os.PathLike) -> tuple[str, str]:
    path = Path(os.path.expanduser(text))
    if isinstance(text, str) and not os.path.isfile(path):
        if len(text.split()) == 1 and len(text) < 256 and path.suffix.isascii() and path.suffix[1:].isalnum():
            raise InputError(
                "no such file", place=text, remedy="Give the path of a UTF-8 text file, or the text itself"
            )
        return text, "the given text"
    try:
        return path.read_bytes().decode("utf-8-sig"), path.name
    except OSError as error:
        raise InputError(f"cannot read the text: {error.strerror}", place=str(path)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start} is not UTF-8", place=str(path), remedy="Convert the file") from None


def _own(
    captured: CapturedModel, tokenizer, windows: int, window: int, progress: StageProgress
) -> Text:
    spec = CalibrationSpec(
        source="self", samples=windows, sequence_length=window, seed=OWN_SEED, batch_size=min(windows, 8)
    )
    size = captured.settings["vocab_size"]
    if captured.kind == "encoder":
        samples = load_samples(spec.model_copy(update={"source": "random"}), tokenizer=tokenizer, vocab_size=size)
        return Text(samples.input_ids, f"{samples.described}; an encoder writes no text itself", True)
    samples = own_text(captured, spec, progress, "the float model writes the text")
    return Text(samples.input_ids, samples.described, True)
