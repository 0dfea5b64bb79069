"""What is read of packed codes is what a slow packer put there, and what the formula of the method makes of them."""

import pytest
import torch

from helpers import coded_checkpoints as packers
from qexport.errors import CaptureError, PassError
from qexport.models.coded import Given, Header, format_of
from qexport.passes.weights.as_stored import proved

NAMES = {
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.float16: "F16", torch.float32: "F32",
    torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


class Stored:
    """Tensors of a checkpoint in memory, and the one weight that is in them."""

    def __init__(self, said, parts):
        self.tensors = {f"model.layers.0.mlp.up_proj{end}": tensor for end, tensor in parts.items()}
        headers = {name: Header(NAMES[t.dtype], tuple(t.shape)) for name, t in self.tensors.items()}
        (self.weight,) = format_of(said).find(headers, self.tensors.__getitem__)

    def decode(self):
        return self.weight.decode(self.tensors.__getitem__)

    def formula(self):
        return self.weight.formula(self.tensors.__getitem__)


def check(stored, codes, scales, zeros, group_of):
    """Codes, scales and zero points come back as they went in, and stand for the formula's weight."""
    want = packers.dequantized(codes, scales, zeros, group_of)
    assert torch.equal(stored.formula(), want)
    found = proved(stored)
    assert isinstance(found, Given)
    order = torch.arange(codes.shape[1]) if found.order is None else found.order.features
    symmetric = found.weight.zero_point is None
    offset = zeros[0, 0] if symmetric else 0
    assert torch.equal(found.weight.codes.long() + offset, codes[:, order])
    size = found.weight.format.group_size or codes.shape[1]
    of_group = group_of[order][::size]  # of each of the groups that were made
    assert torch.equal(found.weight.scale, scales.float()[:, of_group])
    if not symmetric:
        assert torch.equal(found.weight.zero_point.long(), zeros[:, of_group])
    assert torch.equal(found.dequantize(), want.float())


@pytest.mark.parametrize("act_order", [False, True], ids=["", "act-order"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("bits", "scheme"), [(2, "w2a16_g32"), (3, "w3a16_g32"), (4, "w4a16_g32"), (8, "w8a16_g32")])
def test_gptq(bits, scheme, symmetric, version, act_order):
    made = packers.random_codes((64, 96), bits, 32, symmetric=symmetric, act_order=act_order)
    form = "gptq" if version == 1 else "gptq_v2"
    said = GPTQ | {"bits": bits, "sym": symmetric, "desc_act": act_order, "checkpoint_format": form}
    stored = Stored(said, packers.gptq(*made, bits, version=version))
    assert stored.weight.shape == (64, 96)
    assert stored.weight.scheme.name == scheme + ("" if symmetric else "_asym")
    assert stored.weight.kept == "as stored" + ", input features in the order of their groups" * act_order
    check(stored, *made)


@pytest.mark.parametrize(("group", "columns", "scheme", "kept"), [
    (-1, 96, "w4a16_pc", "as stored"),
    (64, 96, "w4a16_g64", "as stored"),  # the last group is shorter
    (48, 96, "w4a16_g16", "groups of 48 as groups of 16 with the same scale"),
    (1024, 2048, "w4a16_g1024", "as stored"),
], ids=["channel", "shorter", "odd", "long"])  # fmt: skip
def test_groups_of_other_sizes(group, columns, scheme, kept):
    made = packers.random_codes((32, columns), 4, columns if group < 0 else group)
    stored = Stored(GPTQ | {"group_size": group}, packers.gptq(*made, 4))
    assert (stored.weight.scheme.name, stored.weight.kept) == (scheme, kept)
    check(stored, *made)


def test_groups_that_no_kernel_takes_become_float():
    made = packers.random_codes((32, 96), 4, 24)
    stored = Stored(GPTQ | {"group_size": 24}, packers.gptq(*made, 4))
    assert stored.weight.scheme is None and "groups of 24" in stored.weight.kept
    assert torch.equal(proved(stored), packers.dequantized(*made).float())


def test_settings_of_modules():
    said = GPTQ | {"dynamic": {r"-:.*\.0\..*down": {}, r".*\.0\..*up_proj": {"bits": 8, "group_size": 64}, ".*": {}}}
    made = packers.random_codes((32, 128), 8, 64)
    stored = Stored(said, packers.gptq(*made, 8))
    assert stored.weight.scheme.name == "w8a16_g64"
    check(stored, *made)


def test_zero_points_that_wrap_around():
    """gptqmodel subtracts 1 from whole words: a zero point of 0 borrows from the one behind it."""
    codes, scales, zeros, group_of = packers.random_codes((32, 64), 4, 32, symmetric=False)
    zeros[0] = 0
    parts = packers.gptq(codes, scales, zeros, group_of, 4, version=2)
    parts[".qzeros"] -= 0x11111111
    check(Stored(GPTQ | {"sym": False}, parts), codes, scales, zeros, group_of)


@pytest.mark.parametrize(("form", "version", "bits"), [
    ("auto_round:auto_gptq", 1, 4), ("auto_round:gptq", 1, 2), ("auto_round", 2, 4), ("auto_round:gptqmodel", 2, 3),
    ("auto_round:exllamav2", 2, 8),
])  # fmt: skip
def test_auto_round(form, version, bits):
    made = packers.random_codes((64, 96), bits, 32, symmetric=False)
    parts = packers.gptq(*made, bits, version=version)
    del parts[".g_idx"]
    said = {"quant_method": "auto-round", "packing_format": form, "bits": 4, "group_size": 128, "sym": False,
            "data_type": "int", "extra_config": {"model.layers.0.mlp.up": {"bits": 16}, r".*\.1\..*": {"bits": 16},
            "model.layers.0.mlp.up_proj": {"bits": bits, "group_size": 32}}}  # fmt: skip
    stored = Stored(said, parts)
    assert stored.weight.scheme.name == f"w{bits}a16_g32_asym"
    check(stored, *made)


def test_auto_round_in_the_layout_of_awq():
    made = packers.random_codes((64, 96), 4, 32, symmetric=False)
    said = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32}
    check(Stored(said, packers.awq(*made[:3])), *made)


@pytest.mark.parametrize(("group", "scheme"), [(32, "w4a16_g32_asym"), (-1, "w4a16_pc_asym")])
def test_awq(group, scheme):
    made = packers.random_codes((64, 96), 4, 96 if group < 0 else group, symmetric=False)
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    stored = Stored(said, packers.awq(*made[:3]))
    assert stored.weight.scheme.name == scheme
    check(stored, *made)


@pytest.mark.parametrize("act_order", [False, True], ids=["", "g_idx"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("bits", "group", "scheme", "kept"), [
    (2, 32, "w2a16_g32", "as stored"), (3, -1, "w3a16_pc", "codes of 3 bits in 4"), (4, 32, "w4a16_g32", "as stored"),
    (5, 32, "w8a16_g32", "codes of 5 bits in 8"), (8, -1, "w8a16_pc", "as stored"),
])  # fmt: skip
def test_compressed_tensors_packed(bits, group, scheme, kept, symmetric, act_order):
    """Rows of 40 codes of 3 or 5 bits end within a word, and zero points lie along the outputs."""
    shape = (40, 96)
    made = packers.random_codes(shape, bits, 96 if group < 0 else group, symmetric=symmetric, act_order=act_order)
    parts = packers.compressed(*made, bits, symmetric=symmetric)
    stored = Stored(packers.compressed_said("pack-quantized", bits, symmetric, group), parts)
    order = ", input features in the order of their groups" if act_order and group > 0 else ""
    assert (stored.weight.scheme.name, stored.weight.kept) == (scheme + "_asym" * (not symmetric), kept + order)
    check(stored, *made)


@pytest.mark.parametrize(("inputs", "symmetric", "scheme", "kept"), [
    (None, True, "w8a16_pc", "as stored"),
    (None, False, "w8a16_pc_asym", "as stored"),
    ({"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}, True, "w8a8_dyn",
     "as stored"),
    ({"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}, True, "w8a8_static",
     "as stored"),
    ({"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}, False, "w8a16_pc_asym",
     "as stored, but inputs stay float: no integer product takes such weights"),
    ({"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}, True, "w8a16_pc",
     "as stored, but inputs stay float: no kernel takes them as the config has them"),
], ids=["w8a16", "asym", "dynamic", "static", "asym dynamic", "asym inputs"])  # fmt: skip
def test_compressed_tensors_plain(inputs, symmetric, scheme, kept):
    made = packers.random_codes((32, 64), 8, 64, symmetric=symmetric)
    parts = packers.compressed(*made, 8, symmetric=symmetric, pack=False) | {".input_scale": torch.tensor([0.02])}
    stored = Stored(packers.compressed_said("int-quantized", 8, symmetric, inputs=inputs), parts)
    assert (stored.weight.scheme.name, stored.weight.kept) == (scheme, kept)
    check(stored, *made)
    assert stored.decode().input_scale == (pytest.approx(0.02) if scheme == "w8a8_static" else None)


def test_settings_of_a_name_come_before_those_of_a_class():
    said = packers.compressed_said("pack-quantized", 4, True, 32)
    eight = packers.compressed_said("pack-quantized", 8, True, 32)["config_groups"]["group_0"]
    said["config_groups"]["group_1"] = eight | {"targets": ["re:.*layers.0.*up_proj"]}
    made = packers.random_codes((32, 64), 8, 32)
    stored = Stored(said, packers.compressed(*made, 8, symmetric=True))
    assert stored.weight.scheme.name == "w8a16_g32"
    check(stored, *made)


@pytest.mark.parametrize(("said", "block", "scheme"), [
    ({"quant_method": "fp8", "weight_block_size": [32, 48]}, (32, 48), None),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, (128, 128), "w8a16_fp8_b128"),
    ({"quant_method": "fbgemm_fp8"}, (1, 200), "w8a16_fp8"),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, (150, 200), "w8a16_fp8"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}}},
     (150, 200), "w8a16_fp8"),
], ids=["odd blocks", "blocks", "rows", "modelopt", "one"])  # fmt: skip
def test_8_bit_floats(said, block, scheme):
    """A block at the end of either axis is smaller: the grid of scales is rounded up."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(150, 200, generator=random).to(torch.float8_e4m3fn)
    grid = (-(-150 // block[0]), -(-200 // block[1]))
    scales = torch.rand(grid, generator=random)
    want = torch.tensor([
        [float(values[r, c]) * float(scales[r // block[0], c // block[1]]) for c in range(200)] for r in range(150)
    ], dtype=torch.float64)  # fmt: skip
    name = ".weight_scale_inv" if said["quant_method"] == "fp8" else ".weight_scale"
    stored = Stored(said, {".weight": values, name: scales if grid != (1, 1) else scales[0]})
    assert (stored.weight.scheme.name if scheme else stored.weight.scheme) == scheme
    said = "as stored" if scheme else "no kernel takes such 8-bit floats, so that it becomes float"
    assert stored.weight.kept == said
    assert torch.equal(stored.formula(), want)
    found = proved(stored)
    assert torch.equal(found if scheme is None else found.dequantize(), want.float())


@pytest.mark.parametrize("nested", [0, 8], ids=["", "double"])
@pytest.mark.parametrize(("kind", "shape", "block", "scheme", "kept"), [
    ("nf4", (6, 128), 64, "nf4", "as stored"),
    ("fp4", (6, 128), 64, "fp4", "as stored"),
    ("nf4", (6, 256), 128, "nf4_g128", "as stored"),
    ("nf4", (6, 96), 64, "nf4_g32", "blocks of 64 as blocks of 32 with the same scale"),  # they cross the rows
    ("nf4", (6, 100), 64, None, "its blocks of 64 cross its rows, which no kernel takes, so that it becomes float"),
], ids=["nf4", "fp4", "128", "crossing", "odd"])  # fmt: skip
def test_bitsandbytes_of_4_bits(kind, shape, block, scheme, kept, nested):
    random, count = torch.Generator().manual_seed(0), shape[0] * shape[1]
    codes, blocks = torch.randint(0, 16, shape, generator=random), -(-count // block)
    absmax = scales = torch.rand(blocks, generator=random).float()
    if nested:
        absmax = torch.randint(128, 256, (blocks,), generator=random).to(torch.uint8)
        own = packers.nested_absmax(blocks, nested)
        scales = [
            float(packers.NESTED_MAP[index]) * float(own[place // nested]) + packers.OFFSET
            for place, index in enumerate(absmax.tolist())
        ]  # fmt: skip
    table = torch.tensor(packers.TABLES[kind], dtype=torch.float32).tolist()
    want = torch.tensor(
        [table[code] * float(scales[place // block]) for place, code in enumerate(codes.flatten().tolist())],
        dtype=torch.float64,
    ).view(shape)  # fmt: skip
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    stored = Stored(said, packers.bitsandbytes(codes, absmax, kind, block, nested=nested))
    assert (stored.weight.scheme and stored.weight.scheme.name, stored.weight.kept) == (scheme, kept)
    assert torch.equal(stored.formula(), want)
    found = proved(stored)
    if scheme is not None:
        assert torch.equal(found.weight.codes.long(), codes)
        size = found.weight.format.group_size
        of_group = torch.arange(0, count, size) // block
        assert torch.equal(found.weight.scale.flatten(), torch.as_tensor(scales, dtype=torch.float32)[of_group])


def test_bitsandbytes_of_8_bits():
    codes, largest = packers.random_codes((32, 64), 8, 64)[0] - 128, torch.linspace(0.1, 2, 32)
    stored = Stored({"load_in_8bit": True}, {".weight": codes.to(torch.int8), ".SCB": largest})
    assert (stored.weight.scheme.name, stored.weight.kept) == ("w8a16_pc", "as stored")
    assert torch.equal(stored.formula(), codes.double() * largest.double()[:, None] / 127)
    found = proved(stored)
    assert torch.equal(found.weight.codes.long(), codes) and torch.equal(found.weight.scale, largest[:, None] / 127)


def test_a_table_of_somebody_else():
    codes = packers.random_codes((4, 64), 4, 64)[0]
    parts = packers.bitsandbytes(codes, torch.ones(4), "nf4", 64)
    parts[".weight.quant_map"][3] += 0.01
    with pytest.raises(CaptureError, match="is not the table of nf4"):
        Stored({"load_in_4bit": True}, parts).decode()


def test_scales_of_another_grid_are_refused():
    """transformers divides the shape by the grid instead, and reads 192 rows with 2 scales as 96 and 96."""
    values = torch.ones(192, 128).to(torch.float8_e4m3fn)
    with pytest.raises(CaptureError, match=r"has shape \[3, 1\], which is neither"):
        Stored({"quant_method": "fp8", "weight_block_size": [128, 128]},
               {".weight": values, ".weight_scale_inv": torch.ones(3, 1)})  # fmt: skip


def test_what_contradicts_the_config():
    codes, scales, zeros, group_of = packers.random_codes((32, 64), 4, 32)
    parts = packers.gptq(codes, scales, zeros, group_of, 4)
    with pytest.raises(CaptureError, match=r"has shape \[2, 32\], but the config .* \[4, 32\]"):
        Stored(GPTQ | {"group_size": 16}, parts)
    with pytest.raises(CaptureError, match="has zero points other than 8"):
        Stored(GPTQ | {"checkpoint_format": "gptq_v2"}, parts).decode()
    with pytest.raises(CaptureError, match="groups of sizes other than 32"):
        Stored(GPTQ, parts | {".g_idx": torch.zeros(64, dtype=torch.int32)}).decode()
    del parts[".scales"]
    with pytest.raises(CaptureError, match="is missing from the checkpoint"):
        Stored(GPTQ, parts)


def test_a_reading_that_differs_from_the_formula_is_refused(monkeypatch):
    stored = Stored(GPTQ, packers.gptq(*packers.random_codes((32, 64), 4, 32), 4))
    right = stored.decode()
    right.weight.codes[3, 5] ^= 1
    monkeypatch.setattr(stored, "decode", lambda: right)
    with pytest.raises(PassError, match="1 of 2048 weights differ from the formula .* at 3, 5"):
        proved(stored)
