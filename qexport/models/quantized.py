"""Checkpoints that somebody else quantized, told by what their configs say: their weights are codes, not numbers."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CaptureError, InputError
from .coded import CodedCheckpoint, format_of
from .coded.paretoq import METHOD as PARETOQ

FLOAT_MODEL = "Export the float model that it was made from"
# Where configs say that weights are quantized: keys of config.json and of parts of it, and whole files.
_KEYS = ("quantization_config", "compression_config", "quantization")
_FILES = (
    "hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json", "qconfig.json",
)  # fmt: skip
_NAMES = {
    "awq": "AWQ", "bitnet": "BitNet", "eetq": "EETQ", "fp8": "FP8", "fbgemm_fp8": "FBGEMM FP8", "gguf": "GGUF",
    "gptq": "GPTQ", "hqq": "HQQ", "modelopt": "ModelOpt", "mxfp4": "MXFP4", "aqlm": "AQLM", "vptq": "VPTQ",
    "spqr": "SpQR", "higgs": "HIGGS", "quark": "Quark", "auto-round": "AutoRound",
}  # fmt: skip


def codes_of(folder: Path, name: str) -> CodedCheckpoint | None:
    """How the weights of a model are kept as codes; None where its configs say nothing of codes.

    Args:
        name: what the user calls the model.

    Raises:
        InputError: it is quantized by a method, or in a form of one, that is not read; the sentence names it.
    """
    for file, key, section in _sections(folder):
        if what := _method(section, key):
            said, removed = (f"{key} in {file}", f"{key} from {file}") if key else (file, file)
            try:
                found = format_of(section)
            except CaptureError as error:
                raise InputError(error.message, place=name, remedy=error.remedy or FLOAT_MODEL) from None
            if found is not None:
                return found
            raise InputError(
                f"its weights are quantized already with {what}, as {said} says, and such codes cannot be read",
                place=name, remedy=f"{FLOAT_MODEL}; if the weights are float after all, remove {removed}",
            )  # fmt: skip
    return None


def without_codes(said: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of codes."""
    return {
        key: without_codes(value) if isinstance(value, Mapping) else value
        for key, value in said.items() if key not in _KEYS
    }  # fmt: skip


def _sections(folder: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(file, key or "", what it says) of everything that speaks of quantized weights."""
    config = _read(folder / "config.json")
    parts = [("", config), *((f"{key}.", part) for key, part in config.items() if isinstance(part, dict))]
    for prefix, part in parts:
        for key in _KEYS:
            if part.get(key) and isinstance(part[key], dict):
                yield "config.json", prefix + key, part[key]
    if isinstance(config.get("w_bits"), int) and config["w_bits"] < 16:  # ParetoQ's, which has no section of its own
        yield "config.json", "w_bits", {"quant_method": PARETOQ, "w_bits": config["w_bits"]}
    for file in _FILES:
        if said := _read(folder / file):
            yield file, "", said


def _read(file: Path) -> dict[str, Any]:
    """What a JSON file says; nothing where it is missing or damaged, which others report."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _method(section: Mapping[str, Any], key: str) -> str:
    """What quantized the weights, with its bits; empty where the section says that they are float."""
    inner = section.get("quantization")
    if isinstance(inner, dict):  # ModelOpt's
        return _method({"quant_method": "modelopt"} | inner, "")
    method = section.get("quant_method")
    in_bits = [bits for bits in (8, 4) if section.get(f"load_in_{bits}bit")]
    if in_bits or method == "bitsandbytes":
        return f"bitsandbytes, {in_bits[0]} bits" if in_bits else ""
    if method is None:
        if key.endswith("quantization") and "group_size" in section:
            method = "MLX"
        elif "w_bit" in section or "q_group_size" in section:
            method = "awq"
        elif "desc_act" in section:
            method = "gptq"
        elif not key or "config_groups" in section:
            method = "compressed-tensors" if "config_groups" in section else "a method that the file does not name"
    said = [section.get(part) for part in ("quant_algo", "format", "fmt")]
    details = [text for text in said if isinstance(text, str)]
    bits = section.get("bits", section.get("w_bit"))
    details += [f"{bits} bits"] if isinstance(bits, int) and not isinstance(bits, bool) else []
    named = _NAMES.get(str(method).lower(), str(method)) if method is not None else "a method that it does not name"
    return f"{named} ({', '.join(details)})" if details else named
