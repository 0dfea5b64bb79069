"""What a text about speech begins with in Whisper's way: a language, a task, and whether times stand in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError

_SECONDS = 0.02  # between one token for a time and the next
_TASK = "transcribe"


@dataclass(frozen=True)
class Speech:
    """How speech is to be written down.

    Attributes:
        language: as the model's generation config names it, "en" or "<|en|>"; None lets the model hear which it is.
        task: "transcribe", or "translate" into English; None transcribes.
        timestamps: write when things are said, too.
    """

    language: str | None = None
    task: str | None = None
    timestamps: bool = False


@dataclass(frozen=True)
class SpeechTokens:
    """The tokens of a model that say so.

    Attributes:
        untimed: stands at the end of a beginning without times; the times are the tokens behind it.
        languages: by their names; empty where the model knows English alone.
        tasks: by their names.
        usual: what stands behind the first token where nobody asks for anything; None for the language, to be heard.
        asked: the language and the task that the config asks for itself.
    """

    untimed: int
    languages: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)
    usual: tuple[int | None, ...] = ()
    asked: tuple[str | None, str | None] = (None, None)

    def beginnings(
        self, speech: Speech, start: int, rows: int, hears: Callable[[Sequence[Sequence[int]]], np.ndarray]
    ) -> list[list[int]]:
        """What each of `rows` texts begins with.

        Args:
            start: the token that every text begins with.
            hears: (prompts) -> logits behind them [rows, vocabulary], for languages that nobody names.

        Raises:
            InputError: a language or task that the model does not have.
        """
        language, task = speech.language or self.asked[0], speech.task or self.asked[1]
        if (speech.language or speech.task) and not self.languages:
            raise InputError("the model has no other language or task", place="language, task", remedy="Leave it out")
        usual = self.usual if language is None and task is None else ()
        spoken: Sequence[int | None] = usual[:1] * rows
        if language is not None:
            spoken = [self._named(language)] * rows
        elif self.languages and usual[:1] in ((), (None,)):
            known, logits = np.array(sorted(self.languages.values())), hears([[start]] * rows)
            if known[-1] >= logits.shape[-1]:
                raise InputError(
                    f"language {known[-1]} is outside of a vocabulary of {logits.shape[-1]}", place="lang_to_id",
                    remedy="Correct generation_config.json",
                )  # fmt: skip
            spoken = known[logits[:, known].argmax(-1)].tolist()
        rest = usual[1:]
        if task is not None or (language is not None and self.tasks):  # a language that is heard says nothing of a task
            rest = (self._task(task or _TASK),)
        if rest[-1:] == (self.untimed,):
            rest = rest[:-1]
        rest = rest if speech.timestamps else (*rest, self.untimed)
        first = [[start, token] for token in spoken] or [[start] for _ in range(rows)]
        return [[token for token in (*row, *rest) if token is not None] for row in first]

    def _named(self, language: str) -> int:
        name = language.lower()
        found = self.languages.get(name, self.languages.get(f"<|{name}|>"))
        if found is None:
            raise InputError(f"there is no language called {name!r}", place="language", remedy=_choice(self.languages))
        return found

    def _task(self, name: str) -> int:
        if name not in self.tasks:
            raise InputError(f"there is no task called {name!r}", place="task", remedy=_choice(self.tasks))
        return self.tasks[name]

    def timed(self, tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
        """A text with its times between, as in "<|0.00|> Hello.<|1.20|>"."""
        found, between = "", list[int]()
        for token in (*tokens, None):
            if token is None or token > self.untimed:
                found += decode(between) if between else ""
                between = []
                found += "" if token is None else f"<|{_SECONDS * (token - self.untimed - 1):.2f}|>"
            else:
                between.append(token)
        return found


def speech_tokens(stated: Mapping[str, Any]) -> SpeechTokens | None:
    """Those of a generation config; None where it has none."""
    untimed = stated.get("no_timestamps_token_id")
    if not isinstance(untimed, int):
        return None
    both = (stated.get("lang_to_id") or {}, stated.get("task_to_id") or {})
    languages, tasks = ({str(name): int(token) for name, token in of.items()} for of in both)
    usual = tuple(token for _, token in sorted(stated.get("forced_decoder_ids") or []))
    asked = [name if isinstance(name := stated.get(key), str) else None for key in ("language", "task")]
    return SpeechTokens(untimed, languages, tasks, usual, (asked[0], asked[1]))


def _choice(names: Mapping[str, int]) -> str:
    return f"Those it has are {', '.join(name.strip('<|>') for name in names)}"
