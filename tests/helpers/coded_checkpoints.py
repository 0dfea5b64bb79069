"""Checkpoints of codes, packed one code at a time: slow, and apart from what reads them."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = dict[str, Tensor]  # tensors of a linear by what follows its name, such as ".qweight"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def random_codes(
    shape: tuple[int, int], bits: int, group: int, *, symmetric: bool = True, seed: int = 0, act_order: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [N, K], scales float16 [N, G], zero points [N, G] and the group of each input feature [K]."""
    n, k = shape
    random = torch.Generator().manual_seed(seed)
    groups = math.ceil(k / group)
    codes = torch.randint(0, 1 << bits, (n, k), generator=random)
    scales = ((0.5 + torch.rand(n, groups, generator=random)) / k**0.5 / (1 << bits - 1)).half()
    middle = torch.full((n, groups), 1 << bits - 1)
    zeros = middle if symmetric else torch.randint(1, (1 << bits) - 1, (n, groups), generator=random)
    group_of = torch.arange(k) // group
    return codes, scales, zeros, group_of[torch.randperm(k, generator=random)] if act_order else group_of


def packed(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as int32 words: bit i of code j is bit j * bits + i of the row."""
    rows, count = codes.shape
    words = torch.zeros(rows, math.ceil(count * bits / 32), dtype=torch.int64)
    for row in range(rows):
        stream = sum(int(code) << (place * bits) for place, code in enumerate(codes[row].tolist()))
        for word in range(words.shape[1]):
            words[row, word] = (stream >> (32 * word)) & 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, bits: int, *, version: int = 1) -> Parts:
    stored = zeros - 1 if version == 1 else zeros
    return {
        ".qweight": packed(codes, bits).t().contiguous(),
        ".qzeros": packed(stored.t(), bits), ".scales": scales.t().contiguous(), ".g_idx": group_of.int(),
    }  # fmt: skip


def awq(codes: Tensor, scales: Tensor, zeros: Tensor) -> Parts:
    def shuffled(rows: Tensor) -> Tensor:  # [rows, N]
        return rows.reshape(len(rows), -1, 8)[:, :, list(AWQ_ORDER)].reshape(rows.shape)

    return {
        ".qweight": packed(shuffled(codes.t()), 4), ".qzeros": packed(shuffled(zeros.t()), 4),
        ".scales": scales.t().contiguous(),
    }  # fmt: skip


def compressed(
    codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, bits: int, *, symmetric: bool, pack: bool = True
) -> Parts:
    """compressed-tensors, pack-quantized or int-quantized."""
    if pack:
        parts = {".weight_packed": packed(codes, bits), ".weight_shape": torch.tensor(codes.shape)}
        zero = packed(zeros.t(), bits).t()
        if not torch.equal(group_of, group_of.sort().values):
            parts[".weight_g_idx"] = group_of.int()
    else:
        middle = 1 << bits - 1
        parts, zero = {".weight": (codes - middle).to(torch.int8)}, (zeros - middle).to(torch.int8)
    return parts | {".weight_scale": scales} | ({} if symmetric else {".weight_zero_point": zero.contiguous()})


def bitsandbytes(codes: Tensor, absmax: Tensor, kind: str, block: int, *, nested: int = 0) -> Parts:
    """4 bits: the tables are bitsandbytes', the first of two codes is in the high bits.

    Args:
        absmax: one for each block of the flattened weight, float32; with `nested`, indices of its map, uint8.
        nested: absmax that share one of their own; 0 for plain ones.
    """
    flat = codes.flatten().tolist()
    state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(codes.shape)}
    more: Parts = {}
    if nested:
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": OFFSET}
        more = {".weight.nested_absmax": nested_absmax(len(absmax), nested), ".weight.nested_quant_map": NESTED_MAP}
    return more | {
        ".weight": torch.tensor([[16 * a + b] for a, b in zip(flat[::2], flat[1::2], strict=True)], dtype=torch.uint8),
        ".weight.absmax": absmax, ".weight.quant_map": torch.tensor(TABLES[kind], dtype=torch.float32),
        f".weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip


OFFSET = 0.03125  # of nested scales
NESTED_MAP = torch.linspace(-1, 1, 256)
TABLES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)),
}  # fmt: skip


def nested_absmax(count: int, run: int) -> Tensor:
    return torch.linspace(0.01, 0.02, -(-count // run))


def compressed_said(form: str, bits: int, symmetric: bool, group: int = -1, inputs: dict | None = None) -> dict:
    strategy = {"strategy": "group", "group_size": group} if group > 0 else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy}
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }  # fmt: skip


def coded(folder: Path, encode: Callable[[str, tuple[int, int]], tuple[Parts, Tensor] | None], said: dict) -> Path:
    """Give a float checkpoint codes, in place, and its config what it says of them.

    Args:
        encode: from the name of a linear and the shape of its weight to the tensors that take its place, and the float
            weight that they stand for; None keeps it.
        said: the quantization_config.

    Returns:
        A folder beside it with the float weights: what the codes stand for.
    """
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    plain = dict(tensors)
    for name in [n for n in tensors if n.endswith("proj.weight") or n.endswith("lm_head.weight")]:
        path = name.removesuffix(".weight")
        if (made := encode(path, tuple(tensors[name].shape))) is None:
            continue
        del tensors[name]
        tensors |= {path + end: part for end, part in made[0].items()}
        plain[name] = made[1].float().contiguous()
    _save(folder, tensors, config | {"quantization_config": said})
    twin = folder.with_name(f"{folder.name}_float")
    twin.mkdir()
    _save(twin, plain, config)
    return twin


def _save(folder: Path, tensors: Parts, config: dict) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def dequantized(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Tensor:
    """(code - zero point) * scale of the group of each input feature, float64."""
    return (codes - zeros[:, group_of]).double() * scales.double()[:, group_of]
