"""What pydantic found wrong in a recipe, said to the one who wrote it."""

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from ..errors import RecipeError

if TYPE_CHECKING:
    from .sections import Section


def nearest(word: str, known: Any) -> str | None:
    near = _near(word, known)
    return f"Did you mean {near}?" if near else None


def explain(
    spec: "type[Section]",
    error: ValidationError,
    file: str | None = None,
    lines: dict[tuple, int] | None = None,
    given: Any = None,
) -> RecipeError:
    """The first problem pydantic found, with its key, its line and what to do.

    Args:
        given: what was read.
    """
    # A misspelt key is also a missing one: tell the misspelling.
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    path, kind, remedy = first["loc"], first["type"], None
    if kind == "extra_forbidden":
        beside = [e["loc"][-1] for e in error.errors() if e["type"] == kind and e["loc"][:-1] == path[:-1]]
        message, remedy = _unknown(_section(spec, path[:-1], given), beside)
    elif kind == "missing":
        message = "this key is missing"
    elif kind == "value_error":
        message, remedy = (*first["ctx"]["error"].args, None)[:2]
    else:
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
    line = next((lines[part] for part in (path, path[:-1]) if part in lines), None) if lines else None
    where = file if line is None else f"{file}:{line}"
    return RecipeError(message, place=", ".join(filter(None, [where, ".".join(map(str, path))])) or None, remedy=remedy)


def _unknown(section: "type[Section]", keys: Sequence[Any]) -> tuple[str, str]:
    """What is wrong with keys that a section does not take, and what to do; the first is the one to speak of."""
    first, own, others = str(keys[0]), section.known_keys(), section.keys_of_others()
    if first in others:
        foreign = [str(key) for key in keys if key in others]
        takers = sorted({name for key in foreign for name in others[key]})
        are, them = ("is not a key", "it") if len(foreign) == 1 else ("are not keys", "them")
        message = f"{_listed(foreign)} {are} of {section.called()}, but of {_listed(takers)}"
        return message, f"Remove {them}, or take another method"
    if not (near := nearest(first, own)) and (other := _near(first, others)):
        near = f"Did you mean {other}, a key of {_listed(others[other])}?"
    return "unknown key", near or (f"Keys here are {', '.join(own)}" if own else "There are no keys here")


def _near(word: str, known: Any) -> str | None:
    return next(iter(difflib.get_close_matches(word, [str(name) for name in known], n=1)), None)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _section(spec: "type[Section]", path: tuple, given: Any) -> "type[Section]":
    """The section at a path of what was read."""
    for key in path:
        given = given.get(key) if isinstance(given, Mapping) else given[key]
        if isinstance(key, str) and (part := spec.part(key, given)) is not None:
            spec = part
    return spec


def model_in(annotation: Any) -> Any:
    """The model in an annotation, such as `tuple[Model, ...]`; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := model_in(inner))), None)
