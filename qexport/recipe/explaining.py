"""What pydantic found wrong in a recipe, said to the one who wrote it."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..errors import RecipeError


def nearest(word: str, known: Any) -> str | None:
    near = difflib.get_close_matches(word, [str(name) for name in known], n=1)
    return f"Did you mean {near[0]}?" if near else None


def explain(
    spec: type[BaseModel], error: ValidationError, file: str | None = None, lines: dict[tuple, int] | None = None
) -> RecipeError:
    """The first problem pydantic found, with its key, its line and what to do."""
    # A misspelt key is also a missing one: tell the misspelling.
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    path, kind, remedy = first["loc"], first["type"], None
    if kind == "extra_forbidden":
        message = "unknown key"
        valid = _section(spec, path[:-1]).model_fields
        remedy = nearest(str(path[-1]), valid) or f"Keys here are {', '.join(valid)}"
    elif kind == "missing":
        message = "this key is missing"
    elif kind == "value_error":
        message, remedy = (*first["ctx"]["error"].args, None)[:2]
    else:
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
    known = [part for part in (path, path[:-1]) if lines and part in lines]
    where = f"{file}:{lines[known[0]]}" if known else file
    return RecipeError(message, place=", ".join(filter(None, [where, ".".join(map(str, path))])) or None, remedy=remedy)


def _section(spec: type[BaseModel], path: tuple) -> type[BaseModel]:
    for key in path:
        if isinstance(key, str):
            spec = _model_in(spec.model_fields[key].annotation)
    return spec


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)
