"""Reading config.json: what capture takes from it is of its type, in range, finite, and no larger than the weights."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from ..artifact.files import not_finite, read_json
from ..errors import InputError, reading

CONFIG = "config.json"
_MOST = 2**31 - 1  # of any size, and of any token id: ONNX Runtime's kernels count some of them in 32 bits
# Keys whose values are sizes of weights; none of them can be more than the numbers in a checkpoint. Lengths of texts
# are not among them: few models have a row for each position.
_SIZES = re.compile(r"(^|_)(size|dim|rank|width|heads?|head_dim|experts|embd|model|inner|ff|kv)$|^(num|n|d)_")
_LAYERS = re.compile(r"(^|_)(layers?|blocks|depth)$")
_FEW_LAYERS = 64  # as many may share the weights of one


def _number(value: Any) -> Any:
    """A number and not a truth value, which is an int in Python."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    return value


Size = Annotated[int, Field(strict=True, ge=1, le=_MOST)]
SizePerLayer = Size | list[Size]
Token = Annotated[int, Field(strict=True, ge=-1, le=_MOST)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]


class _Some(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Rope(_Some):
    """Rotary positions of one kind of layer."""

    rope_type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    partial_rotary_factor: Annotated[Positive, Field(le=1)] | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Size | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None


class Stated(_Some):
    """What capture and the models' own code read of a config, under the names of transformers' attributes."""

    architectures: list[str] | None = None
    vocab_size: Size | None = None
    hidden_size: Size | None = None
    intermediate_size: SizePerLayer | None = None
    num_hidden_layers: Size | None = None
    num_attention_heads: SizePerLayer | None = None
    num_key_value_heads: SizePerLayer | None = None
    head_dim: SizePerLayer | None = None
    num_local_experts: SizePerLayer | None = None
    num_experts_per_tok: SizePerLayer | None = None
    max_position_embeddings: Size | None = None
    sliding_window: Annotated[int, Field(strict=True, ge=0, le=_MOST)] | None = None
    rms_norm_eps: Annotated[Real, Field(ge=0)] | None = None
    layer_norm_eps: Annotated[Real, Field(ge=0)] | None = None
    layer_norm_epsilon: Annotated[Real, Field(ge=0)] | None = None
    rope_theta: Positive | None = None
    rope_parameters: Rope | dict[str, Rope | None] | None = None
    layer_types: list[str] | None = None
    tie_word_embeddings: bool | None = None
    is_encoder_decoder: bool | None = None
    eos_token_id: Token | list[Token] | None = None
    bos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | None = None


def read_config(folder: Path, name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model, as transformers reads it, once it is plausible.

    Args:
        folder: holds config.json; name: what the user calls the model.

    Raises:
        InputError: no config.json, not one that transformers understands, or a value that no model can have; the place
            names its key.
    """
    path, known = folder / CONFIG, "The folder needs a config.json of a known model_type"
    if not path.exists():
        raise InputError("has no config.json", place=name, remedy=known)
    said = read_json(path, "Download it again")
    key = next(filter(None, (not_finite({k: v}) for k, v in said.items() if not k.endswith("_limit"))), None)
    if key is not None:
        raise InputError("is not a finite number", place=f"{path}, {_dotted(key)}", remedy="Correct it")
    _check_sizes(said, folder, path)
    with reading(name, "has no config that transformers understands", known):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        _check_stated(part, path)
    return config


def _check_stated(config: PretrainedConfig, path: Path) -> None:
    found = {}
    for name in Stated.model_fields:
        # Some are computed from others, and where every layer has its own there is none for all.
        with reading(path, f"{name} cannot be read"), suppress(AmbiguousGlobalPerLayerAttributeError):
            found[name] = getattr(config, name, None)
    try:
        Stated.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        key = (config.attribute_map.get(name, name), *_without_types(first["loc"][1:]))
        raise InputError(
            f"{_lower(first['msg'])}, not {str(first['input'])[:60]!r}", place=f"{path}, {_dotted(key)}",
            remedy="Correct it",
        ) from None  # fmt: skip


def _check_sizes(said: Mapping[str, Any], folder: Path, path: Path) -> None:
    """Refuse what would be built for hours, or fill the memory, before it is compared with the weights."""
    held = _held(folder)
    if held is None:
        return
    tensors, most = held
    for key, value in _integers(said):
        layers = _LAYERS.search(key[-1]) is not None
        if layers and value > max(tensors, _FEW_LAYERS):
            raise _too_much(path, key, value, f"{tensors} tensors")
        if not layers and _SIZES.search(key[-1]) and value > max(most, 2**16):
            raise _too_much(path, key, value, f"fewer than {most:,} numbers")


def _too_much(path: Path, key: tuple, value: int, held: str) -> InputError:
    return InputError(
        f"is {value:,}, but the checkpoint has {held}", place=f"{path}, {_dotted(key)}",
        remedy="The config does not belong to these weights",
    )  # fmt: skip


def _integers(said: Mapping[str, Any], path: tuple = ()):
    for key, value in said.items():
        if isinstance(value, Mapping) and key not in ("id2label", "label2id", "task_specific_params"):
            yield from _integers(value, (*path, key))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*path, key), value


def _held(folder: Path) -> tuple[int, int] | None:
    """How many tensors the safetensors files of a folder have, and twice their bytes: as many numbers of 4 bits."""
    tensors = most = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as handle:
                tensors += len(handle.keys())
            most += 2 * file.stat().st_size
        except Exception:  # a damaged file is reported by what reads it
            return None
    return (tensors, most) if tensors else None


def _without_types(path: tuple) -> tuple:
    """A path of pydantic, which names the members of unions too, as keys of the config."""
    return tuple(part for part in path if isinstance(part, int) or not re.search(r"[\[(]|^(int|float|Rope|dict)", part))


def _dotted(key: tuple) -> str:
    return ".".join(str(part)[:60] for part in key)


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
