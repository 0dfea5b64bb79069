"""Inputs and outputs of a model under the names that exports have, whatever a tool calls them."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from onnx import TensorProto, ValueInfoProto
from torch import Tensor

from ...calibrate.block_activations import Feeds
from ...errors import InputError

CACHE, PRESENT = "past_key_values.", "present."
_WORD = re.compile(r"[a-z]+|\d+")
_KEY_WORDS, _VALUE_WORDS = {"key", "keys", "k"}, {"value", "values", "v"}
_CACHE_WORDS = {"past", "cache", "kv", "present", "new", "out", "in", "updated"}
_PLAIN = {  # words of which a name has all, in this order of precedence
    "token_type_ids": ({"token", "type"}, {"segment"}),
    "position_ids": ({"position"}, {"positions"}),
    "attention_mask": ({"mask"},),
    "input_ids": ({"input", "ids"}, {"tokens"}, {"ids"}, {"input"}),
}
_KNOWN = "input_ids, attention_mask, position_ids, token_type_ids and a cache of keys and values for every layer"
_INTEGERS = (TensorProto.INT32, TensorProto.INT64)


def input_names(inputs: Iterable[ValueInfoProto], place: str) -> dict[str, str]:
    """The name that exports have for each input.

    Raises:
        InputError: one of them is neither tokens nor what belongs to them, nor a cache; or two are the same.
    """
    names: dict[str, str] = {}
    for value in inputs:
        found = cached(value.name, CACHE) if _rank(value) == 4 else _plain(value.name)
        if found is None:
            raise InputError(f"has an input {value.name}, but only {_KNOWN} are known", place=place)
        if found in names.values():
            raise InputError(f"has two inputs for {found}", place=place)
        names[value.name] = found
    return names


def output_names(outputs: Sequence[ValueInfoProto], kind: str, first: str) -> dict[str, str]:
    """The name that exports have for each output that is compared: of a decoder its logits and caches, else the first.

    Args:
        first: the name of the model's own first output.
    """
    if kind != "decoder":
        return {outputs[0].name: first} if outputs else {}
    named = {value.name: name for value in outputs if _rank(value) == 4 and (name := cached(value.name, PRESENT))}
    logits = [value.name for value in outputs if value.name not in named and _rank(value) in (3, None)]
    best = "logits" if "logits" in logits else next(iter(logits), None)
    return named | ({best: "logits"} if best else {})


def paired(values: Sequence[ValueInfoProto], names: Sequence[str], what: str, place: str) -> dict[str, str]:
    """The name that a module has for each input or output: the same, or else that of the same place.

    Args:
        names: of the module's; what: "input" or "output".

    Raises:
        InputError: there are more or fewer of them, under other names.
    """
    there = [value.name for value in values]
    if set(there) <= set(names):
        return {name: name for name in there}
    if len(there) != len(names):
        raise InputError(
            f"has {len(there)} {what}s, {', '.join(there[:5])}, and the module {len(names)}: {', '.join(names[:5])}",
            place=place, remedy="Give the module that this file was made from",
        )  # fmt: skip
    return dict(zip(there, names, strict=True))


def cached(name: str, prefix: str) -> str | None:
    """`prefix` with number and kind of the cache that a name means; None where it means none."""
    words = _WORD.findall(name.lower())
    numbers = [word for word in words if word.isdigit()]
    # "key_values" names both, and the kind stands behind: the last word counts.
    kinds = [word for word in words if word in _KEY_WORDS | _VALUE_WORDS]
    if not numbers or not kinds or not _CACHE_WORDS & set(words):
        return None
    return f"{prefix}{int(numbers[-1])}.{'key' if kinds[-1] in _KEY_WORDS else 'value'}"


def _plain(name: str) -> str | None:
    words = set(_WORD.findall(name.lower()))
    return next((known for known, options in _PLAIN.items() if any(option <= words for option in options)), None)


def _rank(value: ValueInfoProto) -> int | None:
    kind = value.type.tensor_type
    return len(kind.shape.dim) if kind.HasField("shape") else None


def is_integer(value: ValueInfoProto) -> bool:
    """Whether a value holds int32 or int64."""
    return value.type.tensor_type.elem_type in _INTEGERS


def feeds_for(feeds: Feeds, shapes: Mapping[str, Sequence[int | str | None]]) -> Feeds:
    """What the float model reads, with everything besides that a file takes.

    Args:
        feeds: inputs of the float model by public name, of a text model "input_ids" among them.
        shapes: of the file's inputs, by the names that exports have; dynamic dimensions are no numbers.

    Raises:
        InputError: the file has a cache whose sizes nobody says.
    """
    if shapes.keys() <= feeds.keys():
        return feeds
    ids = feeds["input_ids"]
    made: dict[str, Tensor] = {
        "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
    }  # fmt: skip
    whole = dict(feeds)
    for name, dims in shapes.items():
        if name in whole:
            continue
        if name in made:
            whole[name] = made[name]
            continue
        heads, size = dims[1], dims[3]
        if not isinstance(heads, int) or not isinstance(size, int):
            raise InputError(f"does not state the sizes of {name}, and the float model has no such cache")
        whole[name] = torch.zeros(len(ids), heads, 0, size)
    return whole
