"""Checkpoints that somebody else quantized: read or refused by what configs say, and by what lies beside a weight."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.random_decoders import save_model
from helpers.random_modules import save_encoder
from qexport.api.stages.capturing import capture_model
from qexport.errors import CaptureError, InputError
from qexport.models.quantized import codes_of
from qexport.models.source import open_model

CONFIGS = {  # what a config says, and what the sentence names
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "W4A8_NVFP4_FP8"}, r"ModelOpt \(W4A8_NVFP4_FP8\)"),
    "vptq": ({"quant_method": "vptq"}, "VPTQ"),
    "eetq": ({"quant_method": "eetq"}, "EETQ"),
    "unknown": ({"quant_method": "new-method", "bits": 3}, r"new-method \(3 bits\)"),
    "without a method": ({"group_size": 64}, "a method that it does not name"),
}


def say(folder, **files):
    for name, said in files.items():
        (folder / f"{name}.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("form", CONFIGS)
def test_the_method_is_named(tmp_path, form):
    said, named = CONFIGS[form]
    with pytest.raises(InputError, match=f"quantized already with {named}, as quantization_config in config.json"):
        open_model(say(tmp_path, config={"model_type": "llama", "quantization_config": said}))


@pytest.mark.parametrize(("files", "named"), [
    ({"config": {"quantization": {"group_size": 64, "bits": 4}}}, r"MLX \(4 bits\), as quantization in config.json"),
    ({"config": {"text_config": {"quantization_config": {"quant_method": "vptq"}}}}, "VPTQ, as text_config.quanti"),
    ({"hf_quant_config": {"quantization": {"quant_algo": "FP3"}}}, r"ModelOpt \(FP3\), as hf_quant_config.json"),
], ids=["mlx", "part", "modelopt"])  # fmt: skip
def test_other_places_where_it_is_said(tmp_path, files, named):
    with pytest.raises(InputError, match=named):
        codes_of(say(tmp_path, **files), "model")


@pytest.mark.parametrize(("files", "described"), [
    ({"config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}},
     "GPTQ, 4 bits with one scale per output feature"),
    ({"quantize_config": {"bits": 4, "group_size": 128, "desc_act": True}}, "GPTQ, 4 bits in groups of 128, act-order"),
    ({"config": {"text_config": {"quantization_config": {"quant_method": "awq", "group_size": 64}}}},
     "AWQ, 4 bits in groups of 64"),
    ({"quant_config": {"w_bit": 4, "q_group_size": 128}}, "AWQ, 4 bits in groups of 128"),
    ({"config": {"quantization_config": {"quant_method": "auto-round", "bits": 4, "group_size": 128}}},
     "AutoRound, 4 bits in groups of 128"),
    ({"hf_quant_config": {"quantization": {"quant_algo": "FP8"}}}, "FP8"),
    ({"hf_quant_config": {"quantization": {"quant_algo": "NVFP4"}}}, "ModelOpt, NVFP4"),
    ({"config": {"text_config": {"quantization_config": {"quant_method": "hqq"}}}}, "HQQ, settings by linear"),
    ({"config": {"quantization_config": {"load_in_8bit": True}}}, "bitsandbytes, int8"),
    ({"config": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True,
                                         "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}},
     "bitsandbytes, nf4, double quantization"),
    ({"config": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}},
     "FP8 in blocks of 128 x 128"),
    ({"config": {"compression_config": {"format": "pack-quantized", "config_groups": {"group_0": {
        "weights": {"num_bits": 4, "group_size": 128, "strategy": "group"},
        "input_activations": {"num_bits": 8, "dynamic": True}}}}}},
     "compressed-tensors, pack-quantized: int4 in groups of 128 with dynamic int8 inputs"),
], ids=[
    "gptq", "gptq's file", "part", "awq's file", "auto-round", "modelopt", "nvfp4", "hqq", "int8", "nf4", "fp8",
    "compression",
])  # fmt: skip
def test_methods_that_are_read(tmp_path, files, described):
    assert codes_of(say(tmp_path, **files), "model").described == described


@pytest.mark.parametrize(("said", "named"), [
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "the layout marlin of a GPU kernel"),
    ({"quant_method": "gptq", "bits": 5}, "GPTQ with 5 bits"),
    ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int64"}, "packed in int64"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "in the layout gemv"),
    ({"quant_method": "compressed-tensors", "config_groups": {}, "transform_config": {"u": 1}}, "asks for a transform"),
    ({"quant_method": "compressed-tensors", "config_groups": {}, "sparsity_config": {"format": "sparse-24-bitmask"}},
     r"asks for sparse tensors \(sparse-24-bitmask\)"),
    ({"quant_method": "auto-round", "data_type": "mx_fp", "bits": 4}, "of mx_fp with 16-bit inputs"),
    ({"quant_method": "auto-round", "bits": 4, "rotation_config": {"a": 1}}, "are with rotation_config"),
    ({"quant_method": "fp8", "weight_block_size": 128}, "FP8 in blocks of 128, which is not a block size"),
], ids=["marlin", "bits", "words", "gemv", "transform", "sparse", "floats", "rotated", "fp8"])  # fmt: skip
def test_forms_that_are_not_read(tmp_path, said, named):
    with pytest.raises(InputError, match=named):
        codes_of(say(tmp_path, config={"quantization_config": said}), "model")


@pytest.mark.parametrize("said", [
    None, {}, {"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": False}
], ids=["null", "empty", "neither"])  # fmt: skip
def test_configs_of_float_models(tmp_path, said):
    folder = say(tmp_path, config={"quantization_config": said, "text_config": {"quantization": said}})
    assert codes_of(folder, "model") is None


def float8(w, scale):
    return (w / scale).to(torch.float8_e4m3fn)


CODES = {  # what a linear's weight becomes, by what follows the linear's name, and what the sentence names
    "fp8 blocks": (
        lambda w: {"weight": float8(w, 0.01), "weight_scale_inv": torch.full((1, 1), 0.01)}, "block-scaled FP8"
    ),
    "fp8": (lambda w: {"weight": float8(w, 0.01), "weight_scale": torch.ones(len(w), 1)}, "FP8 or int8 with scales"),
    "static inputs": (lambda w: {"weight": w, "input_scale": torch.ones(1)}, "static FP8 or int8 inputs"),
    "int8": (lambda w: {"weight": w.to(torch.int8), "weight_scale": torch.ones(len(w), 1)}, "FP8 or int8 with scales"),
    "bnb int8": (lambda w: {"weight": w.to(torch.int8), "SCB": torch.ones(len(w))}, "bitsandbytes, 8 bits"),
    "bnb 4 bits": (
        lambda w: {"weight": torch.zeros(w.numel() // 2, 1, dtype=torch.uint8), "weight.absmax": torch.ones(4)},
        "bitsandbytes, 4 bits",
    ),
    "gptq": (
        lambda w: {"qweight": torch.zeros(w.shape[1] // 8, len(w), dtype=torch.int32), "scales": torch.ones(1, len(w))},
        "GPTQ or AWQ",
    ),
    "packed": (
        lambda w: {"weight_packed": torch.zeros(len(w), 8, dtype=torch.int32), "weight_scale": torch.ones(len(w), 2)},
        "compressed-tensors, packed",
    ),
    "mlx": (
        lambda w: {"weight": torch.zeros(len(w), 8, dtype=torch.uint32), "scales": torch.ones(len(w), 1),
                   "biases": torch.ones(len(w), 1)},
        "MLX",
    ),
    "lora": (lambda w: {"weight": w, "lora_A.weight": torch.ones(4, w.shape[1])}, "nothing reads it.*adapters merged"),
}  # fmt: skip


def coded(folder, encode, ends="proj.weight"):
    """Rewrite the weights of linears."""
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(ends)]:
        parts = encode(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + end: t.contiguous() for end, t in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


@pytest.mark.parametrize("form", CODES)
def test_codes_are_refused_whatever_the_config_says(shallow, tmp_path, form):
    encode, named = CODES[form]
    with pytest.raises(CaptureError, match=named) as caught:
        capture_model(coded(shutil.copytree(shallow, tmp_path / "model"), encode))
    assert caught.value.place.startswith("model.layers.0.")


def test_one_weight_of_integers_is_named(shallow, tmp_path):
    folder = coded(
        shutil.copytree(shallow, tmp_path / "model"), lambda w: {"weight": w.to(torch.int32)}, "up_proj.weight"
    )
    with pytest.raises(CaptureError, match="is stored as I32 .* where the model reads a float weight") as caught:
        capture_model(folder)
    assert caught.value.place == "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(("encode", "named"), [
    (lambda w: {"weight": float8(w, 0.01), "weight_scale_inv": torch.full((1, 1), 0.01)}, "block-scaled FP8"),
    (lambda w: {"qweight": torch.zeros(8, len(w), dtype=torch.int32), "scales": torch.ones(1, len(w))}, "GPTQ or AWQ"),
], ids=["scaled", "packed"])  # fmt: skip
def test_codes_of_a_checkpoint_that_transformers_converts(model_folder, tmp_path, encode, named):
    folder = coded(shutil.copytree(model_folder("mixtral"), tmp_path / "model"), encode, ("w1.weight", "w2.weight"))
    with pytest.raises(CaptureError, match=named):
        capture_model(folder)


def test_codes_of_an_encoder(tmp_path):
    def encode(w):
        return {"weight": w.to(torch.int8), "SCB": torch.ones(len(w))}

    with pytest.raises(CaptureError, match="bitsandbytes, 8 bits"):
        capture_model(coded(save_encoder("bert", tmp_path), encode, "query.weight"))
    folder = coded(save_encoder("bert", tmp_path), lambda w: {"weight": w.to(torch.int8)}, "query.weight")
    with pytest.raises(CaptureError, match="is stored as I8"):
        capture_model(folder)
