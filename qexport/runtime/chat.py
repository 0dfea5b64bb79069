"""A conversation with an exported decoder: it reads all turns so far and answers, token by token."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import manifest as manifests
from ..artifact.manifest import DECODER
from ..errors import InputError
from .decoder import Decoder, open_decoder
from .drafts import Drafts, spare_tokens
from .generate import TextStream, decoded, eos_token_ids, limits, open_tokenizer, templated, token_ids
from .sampling import Sampling
from .seq2seq import is_seq2seq
from .vision_language import PicturesAndText, is_vision_language, open_processor, open_vision_language, prompt_of

_LENGTH = 4096  # tokens of a conversation, where the model's context is longer or unknown


class Chat:
    """A conversation; the session stays open from one turn to the next.

    Args:
        folder: an exported decoder, or model of pictures and text, with a chat template.
        system: what the system says before everything; it stays when turns are forgotten.
        max_new_tokens: of an answer.
        sampling: how to draw; None takes the likeliest token.
        threads: threads within an operator; None: every physical core.
        provider: run on this provider instead of the one the file was made for.
        drafts: guess the next tokens and read them together.

    Attributes:
        turns: what was said so far, the system first; an answer that was stopped as far as it came. Of a model of
            pictures and text contents are lists of parts, pictures among them.

    Raises:
        InputError: the folder is no decoder, or has no usable tokenizer.
        RuntimeProblem: as `open_session`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        threads: int | None = None,
        provider: str | None = None,
        drafts: Drafts | None = None,
    ):
        self._folder = Path(folder)
        if is_seq2seq(self._folder):
            raise InputError(
                "an encoder-decoder cannot hold a conversation", place=str(folder), remedy="Use qexport generate"
            )
        self._sees = is_vision_language(self._folder)
        manifest = manifests.load(self._folder / DECODER if self._sees else self._folder)
        self._tokenizer = open_tokenizer(self._folder)
        context, _ = limits(self._folder, manifest)
        length, self._drafts = min(context or _LENGTH, _LENGTH), drafts
        self._length = length - spare_tokens(drafts)
        self._new_tokens = min(max_new_tokens, max(self._length // 2, 1))
        self._sampling = sampling
        self._decoder: Decoder
        self._reader: PicturesAndText | None = None
        self._processor = open_processor(self._folder) if self._sees else None
        options: dict[str, Any] = {"threads": threads, "provider": provider, "max_length": length}
        if self._sees:
            self._reader, self._decoder = open_vision_language(self._folder, **options)
        else:
            self._decoder = open_decoder(self._folder, manifest, **options)
        self._system = [] if system is None else [self._turn("system", system)]
        self.turns: list[dict[str, Any]] = list(self._system)

    def say(self, text: str, on_text: Callable[[str], None] | None = None, images: Sequence[Any] = ()) -> str:
        """Say something, and return the answer; both become turns.

        The oldest turns are forgotten where all together leave no room for an answer. Whatever interrupts an answer,
        what there is of it stays a turn.

        Args:
            on_text: called with pieces of the answer while it grows.
            images: of a model of pictures and text, pictures in front of the text, as `generate` takes them.

        Raises:
            InputError: there is no chat template, it refuses the turns, or the text alone leaves no room; pictures that
                the model does not read.
        """
        if images and not self._sees:
            raise InputError("this export does not read pictures", place="images", remedy="Leave them out")
        turns, ids, pictures = self._fitting([*self.turns, self._turn("user", text, images)])
        never: tuple[int, ...] = ()
        if self._reader is not None:
            never = (self._reader.token,)
            self._reader.read(pictures) if pictures else self._reader.forget()
        stream, said = TextStream(self._tokenizer, self._folder), list[int]()

        def on_token(row: int, token: int) -> None:
            said.append(token)
            piece = stream.push(token)
            if piece and on_text:
                on_text(piece)

        try:
            self._decoder.generate(
                [ids], max_new_tokens=self._new_tokens, sampling=self._sampling, on_token=on_token,
                eos_token_ids=eos_token_ids(self._folder, self._tokenizer.eos_token_id), drafts=self._drafts,
                never=never,
            )  # fmt: skip
            rest = stream.finish()
            if rest and on_text:
                on_text(rest)
        finally:
            answer = decoded(self._tokenizer, said, self._folder)
            self.turns = [*turns, self._turn("assistant", answer)]
        return answer

    def forget(self) -> None:
        """Begin anew, behind what the system says."""
        self.turns = list(self._system)

    def _turn(self, role: str, text: str, images: Sequence[Any] = ()) -> dict[str, Any]:
        if not self._sees:
            return {"role": role, "content": text}
        pictures = [{"type": "image", "image": image} for image in images]
        return {"role": role, "content": [*pictures, {"type": "text", "text": text}]}

    def _tokens(self, turns: list[dict[str, Any]]) -> tuple[list[int], Mapping[str, np.ndarray]]:
        """Token ids of turns, and what the encoder reads of their pictures."""
        text = templated(self._processor if self._sees else self._tokenizer, turns, self._folder)
        parts = [part for turn in turns if self._sees for part in turn["content"]]
        if images := [part["image"] for part in parts if part["type"] == "image"]:
            return prompt_of(self._processor, text, images, self._folder, special=False)
        (ids,) = token_ids(self._tokenizer, [text], self._folder, special=False)
        return ids, {}

    def _fitting(
        self, turns: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[int], Mapping[str, np.ndarray]]:
        """The turns, without as many of the oldest as leave no room for an answer, and what is read of them."""
        first = len(self._system)
        while True:
            ids, pictures = self._tokens(turns)
            if len(ids) + self._new_tokens <= self._length:
                return turns, ids, pictures
            if len(turns) <= first + 1:
                raise InputError(
                    f"its {len(ids)} tokens leave no room for an answer of {self._new_tokens}: a conversation has "
                    f"{self._length} at most", place="prompt", remedy="Say less, or ask for shorter answers",
                )  # fmt: skip
            del turns[first : first + 2]  # a question and its answer
