"""GGUF files as folders of safetensors: transformers converts them, and every tensor is accounted for.

Linears keep their blocks where kernels hold these as they are; all else becomes float.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..artifact.files import read_json
from ..artifact.scratch import scratch_folder
from ..errors import InputError, reading
from .configs import CONFIG
from .gguf_codes import StoredBlocks, stored_blocks
from .gguf_header import check_gguf

# Of the conversion: raised when an older one made other folders of the same file.
_CONVERSION = 3
_SAMPLE = 1 << 16
_FREQUENCIES = "rope_freqs.weight"
_MADE_AGAIN = ("Download or convert the file again", "Give the model in its original form, as safetensors")


@dataclass(frozen=True)
class _Contents:
    """What a file says of itself.

    Attributes:
        parts: files of its split set, 1 for a file that is whole.
        scaling, factor: of its rotary frequencies: "none", "linear", "yarn", ...
        frequencies: what each of them is divided by, float32 [head_dim / 2]; None where the file has none.
        sizes: elements of each tensor, by name; those of rotary frequencies and of layers for speculation left out.
    """

    parts: int
    scaling: str
    factor: float
    frequencies: torch.Tensor | None
    sizes: dict[str, int]


def convert(file: Path, cache: Path | None = None) -> Path:
    """The folder of safetensors that a GGUF file becomes, made once, and kept only if every tensor is the file's.

    Args:
        cache: where such folders are kept; by default below $XDG_CACHE_HOME or ~/.cache.

    Raises:
        InputError: the file is damaged, one of a split set, lacks tensors, or holds some that transformers does not
            read.
    """
    root = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qexport"
    target = root / f"{file.stem}-{_key(file)}"
    if target.exists():
        return target
    check_gguf(file)
    contents = _contents(file)
    if contents.parts > 1:
        raise InputError(
            f"is one of the {contents.parts} files of a split model", place=str(file),
            remedy="Join them first: llama-gguf-split --merge FIRST_FILE WHOLE.gguf",
        )  # fmt: skip
    model, tokenizer = _loaded(file)
    _check_complete(model, contents, file)
    _settle_frequencies(model.config, contents, file)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.__dict__["hf_quantizer"] = None  # the weights are float now, and save_pretrained would refuse them
    blocks = _blocks(model, file)
    _save(model, tokenizer, blocks, target)
    return target


def _key(file: Path) -> str:
    """Of whatever the folder depends on: the file, and who converts it how."""
    state, digest = file.stat(), hashlib.sha256()
    digest.update(f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}|{_CONVERSION}".encode())
    digest.update("|".join(version(name) for name in ("transformers", "gguf")).encode())
    with open(file, "rb") as content:
        for place in (0, state.st_size // 2, max(state.st_size - _SAMPLE, 0)):
            content.seek(place)
            digest.update(content.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _contents(file: Path) -> _Contents:
    from gguf import GGUFReader

    with reading(file, "cannot be read as GGUF"):
        reader = GGUFReader(file)

        def field(key: str, default):
            found = reader.get_field(key)
            return default if found is None else found.contents()

        kind = field("general.architecture", "")
        tensors = {t.name: t for t in reader.tensors}
        frequencies = None
        if _FREQUENCIES in tensors:
            frequencies = torch.from_numpy(tensors[_FREQUENCIES].data.copy()).float().flatten()
        sizes = {
            name: int(t.n_elements) for name, t in tensors.items()
            if name != _FREQUENCIES and "nextn" not in name and not name.startswith("mtp.")
        }  # fmt: skip
        return _Contents(
            int(field("split.count", 1)), str(field(f"{kind}.rope.scaling.type", "none")),
            float(field(f"{kind}.rope.scaling.factor", 1.0)), frequencies, sizes,
        )  # fmt: skip


def _loaded(file: Path) -> tuple[PreTrainedModel, object]:
    from .quiet import quiet_transformers

    with reading(file, "cannot be read as GGUF"), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loader: type[Any] = AutoModelForCausalLM  # whose stub knows of no loading info
        model, info = loader.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"lacks {len(missing)} of the model's tensors, first {', '.join(missing[:3])}", place=str(file),
            remedy=_MADE_AGAIN[0],
        )  # fmt: skip
    return model, tokenizer


def _check_complete(model: torch.nn.Module, contents: _Contents, file: Path) -> None:
    """Every value of the file is one of the model's: their numbers are equal."""
    parameters = {id(p): p.numel() for p in model.parameters()}  # tied ones once
    kept = model.state_dict()
    buffers = sum(b.numel() for n, b in model.named_buffers() if n in kept)
    stored, made = sum(contents.sizes.values()), sum(parameters.values())
    if stored in (made, made + buffers):
        return
    strange = Counter(contents.sizes.values()) - Counter(parameters.values())
    names = [name for name, size in contents.sizes.items() if size in strange]
    raise InputError(
        f"holds {stored} weights, but the model that transformers builds from it has {made}"
        f"{f'; it seems to read no {names[0]}' if names else ''}", place=str(file), remedy=_MADE_AGAIN[1],
    )  # fmt: skip


def _settle_frequencies(config: PretrainedConfig, contents: _Contents, file: Path) -> None:
    """Give the config the rotary frequencies of the file, which transformers does not read; in place.

    Raises:
        InputError: they are of a kind that has no form in a config.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if contents.frequencies is not None and rope.get("rope_type") in (None, "default"):
        config.rope_parameters = _llama3(config, rope, contents.frequencies, file)
    elif contents.scaling == "linear" and rope.get("rope_type") in (None, "default"):
        config.rope_parameters = rope | {"rope_type": "linear", "factor": contents.factor}
    elif contents.scaling not in ("none", "linear", rope.get("rope_type")):
        raise InputError(
            f"scales its rotary frequencies by {contents.scaling}, which transformers does not read from GGUF",
            place=str(file), remedy=_MADE_AGAIN[1],
        )  # fmt: skip


def _llama3(config: PretrainedConfig, rope: dict, factors: torch.Tensor, file: Path) -> dict:
    """The rule of Llama 3 that makes these factors; files keep the factors alone."""
    rule = {"rope_type": "llama3", "factor": factors.max().item(), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    base, _ = ROPE_INIT_FUNCTIONS["linear"](_with_rope(config, rope | {"rope_type": "linear", "factor": 1.0}), "cpu")
    for original in (8192, 4096, 2048, 16384, 32768):
        made = rope | rule | {"original_max_position_embeddings": original}
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](_with_rope(config, made), "cpu")
        if found.shape == factors.shape and torch.allclose(base / found, factors, rtol=1e-4):
            return made
    if torch.all(factors == 1):
        return rope
    raise InputError(
        f"has rotary frequencies of its own ({_FREQUENCIES}) that are not Llama 3's, which transformers does not read",
        place=str(file), remedy=_MADE_AGAIN[1],
    )  # fmt: skip


def _with_rope(config: PretrainedConfig, rope: dict) -> PretrainedConfig:
    twin = type(config).from_dict(config.to_dict())
    twin.rope_parameters = rope
    return twin


def _blocks(model: PreTrainedModel, file: Path) -> StoredBlocks | None:
    from gguf import GGUFReader

    with reading(file, "cannot be read as GGUF"):
        return stored_blocks(model, GGUFReader(file).tensors)


def _save(model: PreTrainedModel, tokenizer, blocks: StoredBlocks | None, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target.parent) as temporary:
        made = temporary / target.name
        if blocks is None:
            model.save_pretrained(made)
        else:
            model.save_pretrained(made, state_dict=blocks.replace_in(model.state_dict()))
            said = read_json(made / CONFIG) | {"quantization_config": blocks.said}
            (made / CONFIG).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        made.rename(target)
