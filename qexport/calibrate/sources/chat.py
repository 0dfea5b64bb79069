"""Conversations as a model's own chat template writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import InputError, reading

Conversation = Sequence[Mapping[str, Any]]
"""Turns, each with a role and a content, as chat templates take them."""

_TURNS = 'Write [{"role": "user", "content": "..."}, ...]'


def conversation_ids(tokenizer: Any, turns: Any, place: str) -> list[int]:
    """The ids of a whole conversation, answers included.

    Raises:
        InputError: the tokenizer has no chat template or refuses the turns, or they are none; `place` says which.
    """
    if not isinstance(turns, list | tuple) or not turns:
        raise InputError("holds no messages", place=place, remedy=_TURNS)
    if not all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in turns):
        raise InputError("a message has no role", place=place, remedy=_TURNS)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the tokenizer has no chat template", place=place,
            remedy="Calibrate on plain text, or take the model that was trained on conversations",
        )  # fmt: skip
    with reading(place, "the model's chat template refuses it", "Give the roles and the order that it knows"):
        text = tokenizer.apply_chat_template(list(turns), tokenize=False)
    # The template writes what begins a text itself.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
