"""Guesses of how a text goes on, checked by the decoder several tokens in a call (speculative decoding).

Reading a few tokens in one call costs less than as many calls. So the next tokens are guessed by something cheap, one
call gives the logits behind each of them, and what the decoder would not have written is dropped from its cache:
Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023.

A guess here is one token for each place and no distribution. So nothing has to be corrected: each token is chosen from
the decoder's own logits as without drafts, with the same random number, and a guess counts where it is that token. What
is written has the decoder's distribution, whatever is guessed.

A kind of draft is a class that `draft` names; `Drafts(kind=…)` and the command line find it by that name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import InputError
from .row_cost import UNKNOWN, RowCost

_MOST_ROWS = 12  # in a call, where it may choose
_LOSS = 0.01  # calls that wrong guesses may cost for every token written, besides one guess
_HOPE = 0.75  # share of right guesses before there were any
_REMEMBERED = 0.98  # of what guesses came to, a token later: texts change


@dataclass(frozen=True)
class Drafts:
    """Which guesses are made, and how many tokens a call reads.

    Attributes:
        kind: "lookup": what followed the last few tokens when they stood in the text before (Saxena, "Prompt Lookup
            Decoding", 2023).
        rows: tokens of every call behind the prompt, guesses or not: an even number. The text does not depend on the
            guesses then, to the last bit. None reads as many as are likely to be right, one where nothing is.

    Raises:
        InputError: no draft is called so, or an impossible number of rows.
    """

    kind: str = "lookup"
    rows: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(
                f"there is no draft called {self.kind!r}", place="draft", remedy=f"Use {' or '.join(KINDS)}"
            )
        # A row without a neighbour is another kernel's, whose last bits differ.
        if self.rows is not None and (self.rows < 2 or self.rows % 2):
            raise InputError(
                f"{self.rows} is not an even number of rows", place="draft rows", remedy="Use 2, 4, 6 or 8"
            )


class Draft(ABC):
    """Guesses for one text.

    Attributes:
        cheap: a guess costs next to nothing, so that some are made of tokens that are known: of the prompt.
    """

    cheap: ClassVar[bool] = False

    @abstractmethod
    def extend(self, tokens: Sequence[int]) -> None:
        """What the text goes on with: the prompt first."""

    @abstractmethod
    def guess(self, count: int) -> tuple[int, list[int]]:
        """Up to `count` next tokens, and of which sort this guess is.

        Sorts are small numbers that each have a record of their own: 0 is no guess.
        """


KINDS: dict[str, type[Draft]] = {}


def draft(name: str) -> Callable[[type[Draft]], type[Draft]]:
    """Register a kind of draft."""

    def register(kind: type[Draft]) -> type[Draft]:
        KINDS[name] = kind
        return kind

    return register


@draft("lookup")
class Lookup(Draft):
    """What followed the longest run of last tokens, up to `longest`, where it stood last.

    The sort of a guess is the length of that run.
    """

    shortest, longest = 2, 5
    cheap = True

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # of runs of tokens: where what followed them begins

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # Runs that end here are known only once something follows them.
            end = len(self._tokens)
            for size in range(self.shortest, min(self.longest, end) + 1):
                self._ends[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def guess(self, count: int) -> tuple[int, list[int]]:
        for size in range(min(self.longest, len(self._tokens)), self.shortest - 1, -1):
            start = self._ends.get(tuple(self._tokens[-size:]))
            if start is not None:
                period = len(self._tokens) - start
                # A text that repeats itself goes on as it did a period before, beyond its end too.
                return size, [self._tokens[start + i % period] for i in range(count)]
        return 0, []


class Stakes:
    """How many tokens to guess: by what guesses of each sort were worth, and by what was lost so far.

    A call with guesses writes one token more than are right in a row. With a share a of right guesses the i-th one
    pays where a^i is above what it costs, and all of them where they win more than they cost. What all calls together
    cost more than they won stays below one guess and a hundredth of the tokens written, whatever the records say: text
    that does not repeat itself is written without guesses. What a guess would have been is recorded where none is
    given, too, so that it costs nothing to find out that a text has begun to repeat itself.

    Counted in calls and not in seconds: the same text is written however busy the machine is.

    Args:
        cost: of tokens more in a call, in calls of a single token.
        most: guesses of a call.
    """

    def __init__(self, cost: RowCost = UNKNOWN, most: int = _MOST_ROWS - 1):
        self.most, self._cost, self._written, self._lost = most, cost, 0, 0.0
        # A kernel for several rows may cost so much that one guess never pays.
        self._first_loss = next(cost.of(n) for n in range(1, most + 1, 2) if cost.of(n) < n)
        self._records: dict[int, list[float]] = {0: [0.0, 0.0]}  # of a sort: how often right, and looked at; 0: of all

    def guesses(self, sort: int) -> int:
        """How many are worth their call, 0 to the most."""
        if not sort:
            return 0
        # Two guesses of its own weigh as much as what all sorts say, and two of any sort as much as the first hope.
        share = _HOPE
        for right, seen in (self._records[0], self._records.get(sort, (0.0, 0.0))):
            share = (right + 2 * share) / (seen + 2)
        lose = self._first_loss + _LOSS * self._written - self._lost
        count = 0
        while count < self.most and share ** (count + 1) > self._cost.each and self._cost.of(count + 1) <= lose:
            count += 1
        count = even_rows(count)
        return count if sum(share**i for i in range(1, count + 1)) > self._cost.of(count) else 0

    def note(self, sort: int, given: int, right: int) -> None:
        """What came of a call with so many guesses."""
        self._written += right + 1
        self._record(sort, right, min(right + 1, given), right + 1)
        # Of what was won enough for the longest call is kept.
        self._lost = max(self._lost + self._cost.of(given) - right, -self._cost.of(_MOST_ROWS))

    def learn(self, sort: int, right: bool, read: int = 0) -> None:
        """What a guess would have been that no call was spent on.

        Args:
            read: tokens since the last one, where `note` did not say it: 1 in a prompt.
        """
        self._record(sort, int(right), 1 if sort else 0, read)

    def _record(self, sort: int, right: int, seen: int, tokens: int) -> None:
        for record in self._records.values():
            record[:] = [count * _REMEMBERED**tokens for count in record]
        if seen:
            for record in (self._records[0], self._records.setdefault(sort, [0.0, 0.0])):
                record[:] = [record[0] + right, record[1] + seen]


def even_rows(guesses: int) -> int:
    """At most so many guesses that, with the token before them, are an even number of rows."""
    return max(guesses - (guesses + 1) % 2, 0)


def spare_tokens(drafts: Drafts | None) -> int:
    """Tokens that the last call reads beyond the text."""
    return 0 if drafts is None or drafts.rows is None else drafts.rows - 1
