"""A conversation with an exported decoder: it reads all turns so far and answers, token by token."""

from collections.abc import Callable
from pathlib import Path

from ..artifact import manifest as manifests
from ..errors import InputError
from .decoder import open_decoder
from .drafts import Drafts, spare_tokens
from .generate import TextStream, Turn, decoded, eos_token_ids, limits, open_tokenizer, templated, token_ids
from .sampling import Sampling
from .seq2seq import is_seq2seq
from .vision_language import is_vision_language

_LENGTH = 4096  # tokens of a conversation, where the model's context is longer or unknown


class Chat:
    """A conversation; the session stays open from one turn to the next.

    Args:
        folder: an exported decoder with a chat template.
        system: what the system says before everything; it stays when turns are forgotten.
        max_new_tokens: of an answer.
        sampling: how to draw; None takes the likeliest token.
        threads: threads within an operator; None: every physical core.
        provider: run on this provider instead of the one the file was made for.
        drafts: guess the next tokens and read them together.

    Attributes:
        turns: what was said so far, the system first; an answer that was stopped as far as it came.

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
        if is_vision_language(self._folder):
            raise InputError(
                "conversations about pictures are not supported", place=str(folder),
                remedy="Use qexport generate --chat --image FILE",
            )  # fmt: skip
        manifest = manifests.load(self._folder)
        self._tokenizer = open_tokenizer(self._folder)
        context, _ = limits(self._folder, manifest)
        length, self._drafts = min(context or _LENGTH, _LENGTH), drafts
        self._length = length - spare_tokens(drafts)
        self._new_tokens = min(max_new_tokens, max(self._length // 2, 1))
        self._sampling = sampling
        self._decoder = open_decoder(
            self._folder, manifest, threads=threads, provider=provider, max_length=length
        )
        self._system: list[Turn] = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[Turn] = list(self._system)

    def say(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        """Say something, and return the answer; both become turns.

        The oldest turns are forgotten where all together leave no room for an answer. Whatever interrupts an answer,
        what there is of it stays a turn.

        Args:
            on_text: called with pieces of the answer while it grows.

        Raises:
            InputError: there is no chat template, it refuses the turns, or the text alone leaves no room.
        """
        turns: list[Turn] = [*self.turns, {"role": "user", "content": text}]
        turns, ids = self._fitting(turns)
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
            )  # fmt: skip
            rest = stream.finish()
            if rest and on_text:
                on_text(rest)
        finally:
            answer = decoded(self._tokenizer, said, self._folder)
            self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def forget(self) -> None:
        """Begin anew, behind what the system says."""
        self.turns = list(self._system)

    def _fitting(self, turns: list[Turn]) -> tuple[list[Turn], list[int]]:
        """The turns, without as many of the oldest as leave no room for an answer, and their tokens."""
        first = len(self._system)
        while True:
            text = templated(self._tokenizer, turns, self._folder)
            (ids,) = token_ids(self._tokenizer, [text], self._folder, special=False)
            if len(ids) + self._new_tokens <= self._length:
                return turns, ids
            if len(turns) <= first + 1:
                raise InputError(
                    f"its {len(ids)} tokens leave no room for an answer of {self._new_tokens}: a conversation has "
                    f"{self._length} at most", place="prompt", remedy="Say less, or ask for shorter answers",
                )  # fmt: skip
            del turns[first : first + 2]  # a question and its answer
