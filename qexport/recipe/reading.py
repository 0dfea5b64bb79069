"""Reading a YAML mapping so that every key's line is known and none is given twice."""

from typing import Any

import yaml

from ..errors import RecipeError

MOST_BYTES, _DEEPEST = 1 << 18, 16  # of a recipe; mappings and lists within each other


def read_yaml(text: str, place: str) -> tuple[dict[str, Any], dict[tuple, int]]:
    """A YAML mapping as plain Python, and the line of each of its keys by path, e.g. ("overrides", 0, "match").

    Args:
        place: the file's name, for errors.

    Raises:
        RecipeError: not YAML, not a mapping, an alias, or a key given twice, with the line.
    """
    try:
        _check_events(text, place)
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        data = None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise RecipeError(f"this is not YAML: {problem}", place=f"{place}:{mark.line + 1}" if mark else place) from None
    if not isinstance(data, dict):
        raise RecipeError("this is not a mapping", place=place, remedy="Write keys and values, e.g. scheme: w4a16_g32")
    lines: dict[tuple, int] = {}
    _note_lines(root, (), lines, place)
    return data, lines


def _check_events(text: str, place: str) -> None:
    """Refuse what would grow when it is composed, and what is so deep that composing it runs out of stack."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError("a recipe cannot use YAML aliases", place=place, remedy="Write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            line = event.start_mark.line + 1
            raise RecipeError(f"more than {_DEEPEST} mappings and lists within each other", place=f"{place}:{line}")


def _note_lines(node: yaml.Node, path: tuple, lines: dict[tuple, int], place: str) -> None:
    if isinstance(node, yaml.MappingNode):
        # PyYAML silently keeps the last of two equal keys.
        for key, value in node.value:
            where, line = (*path, key.value), key.start_mark.line + 1
            if where in lines:
                raise RecipeError(f"{key.value} is already given in line {lines[where]}", place=f"{place}:{line}")
            lines[where] = line
            _note_lines(value, where, lines, place)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[*path, index] = value.start_mark.line + 1
            _note_lines(value, (*path, index), lines, place)
