"""What libraries wrote, a linear of each, is read as they dequantize it; `helpers.library_checkpoints` made it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from helpers.library_checkpoints import MAKERS, small_model
from qexport.api.stages.capturing import capture_model
from qexport.errors import InputError
from qexport.models.checkpoint import GivenCodes
from qexport.models.coded import Given, Header, format_of
from qexport.models.quantized import codes_of
from qexport.passes.weights.as_stored import proved

DATA = Path(__file__).parent.parent / "data" / "coded"
FLOAT_INPUTS = ", but inputs stay float: no kernel takes them as the config has them"
OFFSETS = ", and the minimums of groups in a product beside it"
FACTORS = ", and its input multiplied by the factors of the checkpoint"
MADE = {  # what the checkpoint is called, the scheme of the linear, and how it is kept
    "hqq_8": ("HQQ, 8 bits in groups of 128 with float zero points", "w8a16_pc", f"as stored{OFFSETS}"),
    "hqq_4": ("HQQ, 4 bits in groups of 64 with float zero points", "w4a16_g64", f"as stored{OFFSETS}"),
    "hqq_3": ("HQQ, 3 bits in groups of 32 with float zero points", "w3a16_g32", f"as stored{OFFSETS}"),
    "hqq_2": ("HQQ, 2 bits in groups of 16 with float zero points", "w2a16_g16", f"as stored{OFFSETS}"),
    "hqq_1": ("HQQ, 1 bits in groups of 32 with float zero points", "w2a16_g32", f"codes of 1 bits in 2{OFFSETS}"),
    "hqq_columns": (
        "HQQ, 4 bits in groups of 64 with float zero points", None,
        "its groups lie along the output features, which no kernel takes, so that it becomes float",
    ),
    "torchao_int8": ("torchao, Int8WeightOnly", "w8a16_pc", "as stored"),
    "torchao_int8_dyn": ("torchao, Int8DynamicActivationInt8Weight", "w8a8_dyn", "as stored"),
    "torchao_int4": ("torchao, IntxWeightOnly", "w4a16_g32", "as stored"),
    "torchao_int3_asym": ("torchao, IntxWeightOnly", "w3a16_g32_asym", "as stored"),
    "torchao_a8w4": ("torchao, Int8DynamicActivationIntxWeight", "w4a16_g32", f"as stored{FLOAT_INPUTS}"),
    "torchao_float8": ("torchao, Float8WeightOnly", "w8a16_fp8", "as stored"),
    "torchao_mxfp8": ("torchao, MXFP8", "mxfp8", "as stored"),
    "torchao_mxfp4": ("torchao, MXFP4", "mxfp4", "as stored"),
    "torchao_nvfp4": ("torchao, NVFP4", "nvfp4", "as stored"),
    "quark_int4_wo_32": ("Quark, int4 in groups of 32", "w4a16_g32", "as stored"),
    "quark_uint4_wo_64": ("Quark, uint4 in groups of 64", "w4a16_g64_asym", "as stored"),
    "quark_int4_wo_per_channel": ("Quark, int4 per channel", "w4a16_pc", "as stored"),
    "quark_uint4_wo_per_channel": ("Quark, uint4 per channel", "w4a16_pc_asym", "as stored"),
    "quark_int8": ("Quark, int8 per tensor with int8 inputs", "w8a8_static", "as stored"),
    "quark_fp8": ("Quark, fp8_e4m3 per tensor with fp8_e4m3 inputs", "w8a16_fp8", "as stored"),
    "quark_mxfp4": ("Quark, fp4 in groups of 32 with fp4 inputs", "mxfp4", "as stored" + FLOAT_INPUTS),
    "modelopt_nvfp4_default": ("ModelOpt, NVFP4", "nvfp4", "as stored" + FLOAT_INPUTS),
    "modelopt_mxfp4_default": ("ModelOpt, MXFP4", "mxfp4", "as stored"),
    "modelopt_int4_awq": ("ModelOpt, W4A16_AWQ", "w4a16_pc", f"as stored{FACTORS}"),
    "modelopt_int8_smoothquant": ("ModelOpt, W8A8_SQ_PER_CHANNEL", "w8a8_static", f"as stored{FACTORS}"),
    "modelopt_fp8_default": ("FP8", "w8a16_fp8", "as stored"),
    "gptq_4": ("GPTQ, 4 bits in groups of 32", "w4a16_g32", "as stored"),
    "gptq_act_order": (
        "GPTQ, 4 bits in groups of 32, act-order", "w4a16_g32_asym",
        "as stored, input features in the order of their groups",
    ),
    "gptq_v2": ("GPTQ, 8 bits in groups of 32", "w8a16_g32", "as stored"),
    "gptq_dynamic": ("GPTQ, 4 bits in groups of 32, settings by module", "w8a16_g64", "as stored"),
    "auto_round_4": ("AutoRound, 4 bits in groups of 32", "w4a16_g32", "as stored"),
    "auto_round_settings": ("AutoRound, 4 bits in groups of 32, settings by module", "w8a16_g64", "as stored"),
    "llm_compressor_w4a16": (
        "compressed-tensors, pack-quantized: int4 in groups of 32", "w4a16_g32", "as stored"
    ),
    "llm_compressor_w8a8": (
        "compressed-tensors, int-quantized: int8 by channel with static int8 inputs", "w8a8_static", "as stored"
    ),
    "bnb_nf4": ("bitsandbytes, nf4, double quantization", "nf4", "as stored"),
    "bnb_fp4": ("bitsandbytes, fp4", "fp4", "as stored"),
    "bnb_int8": ("bitsandbytes, int8", "w8a16_pc", "as stored"),
    "compressed_w4a16": ("compressed-tensors, pack-quantized: int4 in groups of 128", "w4a16_pc", "as stored"),
    "compressed_w4a16_asym": (
        "compressed-tensors, pack-quantized: int4 in groups of 128", "w4a16_pc_asym", "as stored"
    ),
    "compressed_w8a8": (
        "compressed-tensors, int-quantized: int8 by channel with dynamic int8 inputs", "w8a8_dyn", "as stored"
    ),
    "compressed_nvfp4": ("compressed-tensors, nvfp4-pack-quantized: float4 in groups of 16", "nvfp4", "as stored"),
    "compressed_mxfp4": ("compressed-tensors, mxfp4-pack-quantized: float4 in groups of 32", "mxfp4", "as stored"),
}  # fmt: skip
# Libraries that dequantize into float16 and bfloat16: their rounding.
_HALF = {"hqq_3": 2e-3, "compressed_nvfp4": 4e-3} | {name: 2e-3 for name in MAKERS if name.startswith("auto")}


def opened(name):
    """The codes of the weight of a kept file, what its config says, and the weight as its library dequantizes it."""
    with safe_open(DATA / f"{name}.safetensors", framework="pt") as handle:
        said, header = (json.loads(handle.metadata()[key]) for key in ("said", "header"))
        parts = {n: handle.get_tensor(n) for n in handle.keys()}  # noqa: SIM118  a handle is no mapping
        headers = {
            n: Header(handle.get_slice(n).get_dtype(), tuple(parts[n].shape), metadata=header)
            for n in parts if n.startswith("model.")
        }  # fmt: skip
    found = format_of(said)
    (weight,) = found.find(headers, parts.__getitem__)
    assert set(weight.parts) == set(headers), "every tensor of the linear is read"
    return found, GivenCodes(weight, parts.__getitem__), parts["dequantized"].double()


@pytest.mark.parametrize("name", MADE)
def test_values(name):
    found, codes, want = opened(name)
    scheme = codes.weight.scheme and codes.weight.scheme.name
    groups = {"hqq_8": 1, "hqq_4": 2, "hqq_3": 4, "hqq_2": 8, "hqq_1": 4}.get(name, 0)
    assert codes.weight.offsets == groups * 128
    assert (found.described, scheme, codes.weight.kept) == MADE[name]
    made = proved(codes)  # which compares them with the formula
    values = (made.dequantize() if isinstance(made, Given) else made).double()
    rounded = _HALF.get(name, 4 * torch.finfo(torch.float32).eps)  # of the largest of the difference that makes one
    torch.testing.assert_close(values, want, rtol=0, atol=rounded * want.abs().max().item())


def test_scale_of_a_static_input_comes_along():
    _, codes, _ = opened("llm_compressor_w8a8")
    with safe_open(DATA / "llm_compressor_w8a8.safetensors", framework="pt") as handle:
        assert proved(codes).input_scale == float(handle.get_tensor("model.layers.0.mlp.up_proj.input_scale"))


def test_all_files_are_tested():
    assert sorted(MADE) == sorted(file.stem for file in DATA.iterdir())


@pytest.mark.parametrize(("said", "named"), [
    ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, r"ModelOpt \(W4A8_AWQ\)"),
    ({"quant_method": "hqq", "quant_config": {"scale_quant_params": {"nbits": 8}}}, "its HQQ scales or zero points"),
    ({"quant_method": "quark", "export": {"weight_format": "fake_quantized"}}, "its Quark weights are fake"),
], ids=["modelopt", "hqq", "quark"])  # fmt: skip
def test_forms_that_are_not_read(tmp_path, said, named):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    with pytest.raises(InputError, match=named):
        codes_of(tmp_path, "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_what_libraries_write_is_read(tmp_path, name):
    """All linears of a checkpoint that its library makes now, where it is installed."""
    source, out = small_model(tmp_path / "float"), tmp_path / "out"
    try:
        made = MAKERS[name](source, out)
    except ImportError as error:
        pytest.skip(str(error))
    captured = capture_model(out)
    assert made
    for linear, want in made.items():
        found = proved(captured.given[f"{linear}.weight"])
        values = (found.dequantize() if isinstance(found, Given) else found).double()
        rounded = _HALF.get(name, 4 * torch.finfo(torch.float32).eps)
        torch.testing.assert_close(values, want.double(), rtol=0, atol=rounded * want.abs().max().item())
