"""Tensors of a checkpoint that the model does not read: parts of quantized linears are refused, the rest is named.

A linear's own tensors (scales, zero points, codes under other names, a bias that the config knows nothing of) lie
beside its weight. Whoever leaves them out computes something else, so they are an error whatever the method is called.
Whole modules that nobody reads (layers for speculative decoding, towers for images, old buffers) change nothing.
"""

import re
from collections.abc import Callable, Collection, Iterable

from ..errors import CaptureError
from .quantized import FLOAT_MODEL

FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
# What the tensors beside a weight tell of the method; the rule does not depend on this list.
_TELL = (
    ("_scale_inv", "block-scaled FP8"),
    (".SCB", "bitsandbytes, 8 bits"),
    (".absmax", "bitsandbytes, 4 bits"),
    (".quant_map", "bitsandbytes, 4 bits"),
    (".qweight", "GPTQ or AWQ"),
    (".g_idx", "GPTQ"),
    ("_packed", "compressed-tensors, packed"),
    ("_scale_2", "NVFP4"),
    ("_proj_blocks", "MXFP4"),
    (".W_q", "HQQ"),
    (".biases", "MLX"),
    (".input_scale", "static FP8 or int8 inputs"),
    ("weight_scale", "FP8 or int8 with scales, as compressed-tensors and ModelOpt write it"),
)  # fmt: skip
# A buffer that models do without now, and names of norms that transformers renames.
_KNOWN = (r"rotary_emb\.inv_freq$", r"\.(?:gamma|beta)$")


def check_leftovers(
    names: Collection[str],
    unread: Collection[str],
    missing: Collection[str],
    is_zero: Callable[[str], bool],
    ignored: Iterable[str] | None = None,
) -> list[str]:
    """Sort out what nobody reads.

    Args:
        names: all tensors of the checkpoint.
        unread: those that the model does not read.
        missing: weights of the model that the checkpoint does not have.
        is_zero: whether a tensor holds nothing but zeros.
        ignored: regular expressions of names that the architecture leaves out on purpose.

    Returns:
        The tensors that are left out, sorted.

    Raises:
        CaptureError: one belongs to a weight that the model reads, or lacks.
    """
    known = re.compile("|".join(f"(?:{pattern})" for pattern in (*_KNOWN, *(ignored or ()))))
    read = set(names) - set(unread)
    strange = sorted(name for name in unread if not known.search(name) and _belongs(name, read, missing))
    biases = [name for name in strange if name.endswith(".bias")]
    others = [name for name in strange if name not in biases]
    if others or (missing and telling(unread)):
        raise refusal(others or telling(unread))
    for bias in biases:
        if not is_zero(bias):
            raise CaptureError(
                "is in the checkpoint beside a weight that the model reads, but config.json has no such bias",
                place=bias, remedy="The config does not belong to these weights",
            )  # fmt: skip
    return sorted(unread)


def telling(names: Iterable[str]) -> set[str]:
    """Those that methods of quantization put beside a weight or in its place, by their endings."""
    return {name for name in names if name.endswith(tuple(end for end, _ in _TELL))}


def refusal(names: Collection[str]) -> CaptureError:
    """The error for tensors that belong to weights of the model, and which nothing reads."""
    first, *others = sorted(names)
    what = next((method for end, method in _TELL if any(name.endswith(end) for name in names)), None)
    like = f", nor {len(others)} tensors like it" if others else ""
    return CaptureError(
        f"belongs to a weight of the model, but nothing reads it{like}{f': quantized with {what}' if what else ''}",
        place=first, remedy=FLOAT_MODEL if what else
        "Export the float model, with adapters merged; or the config does not belong to these weights",
    )  # fmt: skip


def _belongs(name: str, read: Collection[str], missing: Collection[str]) -> bool:
    """Whether a tensor lies beside or below a weight of the model: X.SCB, X.lora_A.weight, X.weight.absmax, X_scale."""
    ends = [match.start() for match in re.finditer(r"[._:]", name)]
    for stem in (name[:end] for end in ends if name.count(".", 0, end) > 1 or name[end] == "."):
        for weight in (stem, f"{stem}.weight"):
            if weight != name and (weight in read or any(_same(weight, m) for m in missing)):
                return True
    return False


def _same(name: str, missing: str) -> bool:
    """Whether they are one name but for the prefix of a base model."""
    return missing == name or missing.endswith(f".{name}") or name.endswith(f".{missing}")


def check_float_dtype(name: str, dtype: str) -> None:
    """Refuse a weight that is not stored as floating point numbers of 16 bits or more.

    Args:
        dtype: as safetensors calls it.

    Raises:
        CaptureError: it is not.
    """
    if dtype not in FLOATS:
        raise CaptureError(
            f"is stored as {dtype} in the checkpoint, where the model reads a float weight: codes without a scale",
            place=name, remedy=FLOAT_MODEL,
        )  # fmt: skip
