"""Checkpoints written by the libraries that have the formats, of a small Llama, and what these libraries dequantize.

    PYTHONPATH=tests python -m helpers.library_checkpoints FOLDER [NAME ...]    keeps one linear of each in FOLDER

Written with hqq 0.2.8.post1, torchao 0.18.0, amd-quark 0.13, nvidia-modelopt 0.47.0, compressed-tensors 0.20.1,
bitsandbytes 0.50.2, gptqmodel 7.7.0, auto-round 0.16.1, transformers 5.23.0 and torch 2.13.0, and with llmcompressor
0.14.0.1 beside compressed-tensors 0.19.0 and transformers 5.17.0; the libraries are no requirements of this project,
and a maker imports its own.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers.tokenizer_files import write_word_tokenizer

KEPT = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")  # of which the first made is kept in a file
Made = dict[str, Tensor]  # by linear, the weight as its library dequantizes it, float32


def small_model(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A Llama of one layer, its linears 128 wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, 0, 0.08)
    model.to(dtype).save_pretrained(folder)
    write_word_tokenizer(folder, 32)
    return folder


def _loaded(folder: Path, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)


def _linears(model: nn.Module) -> dict[str, Any]:
    """Linears of layers, by name."""
    return {name: m for name, m in model.named_modules() if ".layers." in name and name.endswith("_proj")}


def hqq(source: Path, out: Path, bits: int = 4, size: int = 64, axis: int = 1, dtype: str = "float32") -> Made:
    """As transformers 4 saves them: it puts the library's state dict of each linear into the model's."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model, made, tensors = _loaded(source), {}, {}
    config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis)
    for name, linear in _linears(model).items():
        done = HQQLinear(linear, config, compute_dtype=getattr(torch, dtype), device="cpu", del_orig=False)
        made[name] = done.dequantize().float()
        tensors |= {f"{name}.{key}": value for key, value in done.state_dict().items()}
    weights = {key: {"nbits": bits, "group_size": size, "axis": axis} for key in ("weight_quant_params",)}
    said = {"quant_method": "hqq", "quant_config": {**weights, "scale_quant_params": None}, "skip_modules": ["lm_head"]}
    _save(source, out, made, tensors, said)
    return made


def torchao(source: Path, out: Path, kind: str) -> Made:
    """As transformers saves what the library quantized."""
    import torchao.quantization as ao
    from transformers import TorchAoConfig

    groups = {"granularity": ao.PerGroup(32)}
    config = {
        "int8": lambda: ao.Int8WeightOnlyConfig(version=2),
        "int8_dyn": lambda: ao.Int8DynamicActivationInt8WeightConfig(version=2),
        "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, **groups),
        "int3_asym": lambda: ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int3, mapping_type=ao.MappingType.ASYMMETRIC, **groups
        ),
        "a8w4": lambda: ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=ao.PerGroup(32)
        ),
        "float8": lambda: ao.Float8WeightOnlyConfig(version=2),
    }[kind]()
    model = _loaded(source, quantization_config=TorchAoConfig(config))
    model.save_pretrained(out)
    return {name: linear.weight.dequantize().float() for name, linear in _linears(model).items()}


def torchao_parts(source: Path, out: Path, kind: str) -> Made:
    """Tensors of torchao that configs of transformers make on GPUs alone, flattened by torchao itself."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    encode = {
        "mxfp4": lambda w: MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32),
        "mxfp8": lambda w: MXTensor.to_mx(w, torch.float8_e4m3fn, 32),
        "nvfp4": lambda w: NVFP4Tensor.to_nvfp4(w, per_tensor_scale=w.abs().max().float() / (448 * 6)),
    }[kind]
    model = _loaded(source)
    tensors = {f"{name}.weight": encode(linear.weight.detach()) for name, linear in _linears(model).items()}
    made = {name.removesuffix(".weight"): t.dequantize().float() for name, t in tensors.items()}
    parts, metadata = flatten_tensor_state_dict(tensors)
    said = {"quant_method": "torchao", "quant_type": {"default": {"_type": f"{kind.upper()}Config", "_data": {}}}}
    _save(source, out, made, parts, said, metadata)
    return made


def quark(source: Path, out: Path, scheme: str, reorder: bool = True) -> Made:
    from quark.torch import LLMTemplate, ModelQuantizer, export_safetensors, import_model_from_safetensors

    model = _loaded(source)
    quantizer = ModelQuantizer(LLMTemplate.get("llama").get_config(scheme=scheme, exclude_layers=["lm_head"]))
    data = [torch.arange(32)[None] + shift for shift in range(4)]
    model = quantizer.freeze(quantizer.quantize_model(model, data))
    out.mkdir()
    export_safetensors(model, str(out))
    back = import_model_from_safetensors(_loaded(source), str(out))
    return {name: linear._get_qweight(linear.weight).float() for name, linear in _linears(back).items()}


def modelopt(source: Path, out: Path, name: str) -> Made:
    """Of those with factors of inputs, down_proj alone: the library folds the others into the norm, in its export."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    data = [torch.arange(32)[None] + shift for shift in range(4)]
    model = mtq.quantize(_loaded(source), getattr(mtq, name), lambda m: [m(ids) for ids in data])
    made = {}
    for path, linear in _linears(model).items():
        factor = getattr(linear.input_quantizer, "_pre_quant_scale", None)
        if factor is None and "FP4" not in name:  # whose rounding without a file takes a GPU
            made[path] = linear.weight_quantizer(linear.weight).float().detach().clone()
        elif factor is not None and path.endswith("down_proj"):
            made[path] = (linear.weight_quantizer(linear.weight).float() * factor.float()).detach().clone()
    export_hf_checkpoint(model, export_dir=str(out))
    if "FP4" in name:
        made = {path: _four_bits(load_file(out / "model.safetensors"), path) for path in _linears(model)}
    return made


def _four_bits(tensors: Mapping[str, Tensor], path: str) -> Tensor:
    """A weight of ModelOpt's 4-bit floats as its own class dequantizes it."""
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

    packed, scale = tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"]
    shape = torch.Size((len(packed), 2 * packed.shape[1]))
    if scale.dtype == torch.uint8:
        sizes = {"scale": scale.reshape(-1, 1), "block_sizes": {-1: 32}}
        return MXFP4QTensor(shape, torch.float32, packed).dequantize(**sizes).view(shape)
    sizes = {"scale": scale, "double_scale": tensors[f"{path}.weight_scale_2"], "block_sizes": {-1: 16}}
    return NVFP4QTensor(shape, torch.float32, packed).dequantize(**sizes).view(shape)


def compressed_tensors(source: Path, out: Path, preset: str, form: str) -> Made:
    """The library's own presets and packer; scales by its min-max rule."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    args, made, tensors = scheme.weights, {}, {}
    for name, linear in _linears(_loaded(source)).items():
        weight, state = linear.weight.detach(), {}
        low, high = _ranges(weight, args)
        if form.startswith("nvfp4"):
            state["weight_global_scale"] = generate_gparam(low.min()[None], high.max()[None])
        scale, zero = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
        state |= {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            state["weight_zero_point"] = zero
        compressor = BaseCompressor.get_value_from_registry(form)
        packed = compressor.compress(dict(state), scheme)
        back = compressor.decompress({k: v.clone() for k, v in packed.items()}, scheme)
        made[name] = back["weight"].float()
        tensors |= {f"{name}.{key}": value for key, value in packed.items()}
    group = json.loads(scheme.model_dump_json())
    said = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
            "ignore": ["lm_head"]}  # fmt: skip
    _save(source, out, made, tensors, said)
    return made


def _ranges(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    return groups.amin(-1), groups.amax(-1)


def gptqmodel(source: Path, out: Path, bits: int = 4, size: int = 32, **options: Any) -> Made:
    """Quantized by the library on ids at random."""
    import gptqmodel as library
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    library._default_cpu_workers = lambda: 2  # of which it takes one on two cores, and then asks for two
    config = QuantizeConfig(bits=bits, group_size=size, device="cpu", **options)
    model = GPTQModel.load(str(source), config)
    data = [torch.randint(0, 64, (128,), generator=torch.Generator().manual_seed(seed)) for seed in range(64)]
    with chdir(out.parent):  # it leaves its log in the working folder
        model.quantize([{"input_ids": ids[None], "attention_mask": torch.ones(1, 128).long()} for ids in data])
    model.save(str(out))
    # Its linear for any CPU is loaded in 16 bits, and computes in the dtype that its scales have then.
    back = GPTQModel.load(str(out), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model.float()
    return {
        name: linear.dequantize_weight().t().float() for name, linear in _linears(back).items()
        if hasattr(linear, "qweight")
    }  # fmt: skip


def bitsandbytes(source: Path, out: Path, **options: Any) -> Made:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    model = _loaded(source, quantization_config=BitsAndBytesConfig(**options))
    model.save_pretrained(out)
    return {
        name: dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
        if options.get("load_in_4bit") else linear.weight.CB.float() * linear.weight.SCB[:, None] / 127
        for name, linear in _linears(model).items()
    }  # fmt: skip


def auto_round(source: Path, out: Path, layers: Any = None, **options: Any) -> Made:
    """Tuned by the library for a few steps on ids at random."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    data = [torch.randint(0, 64, (1, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    tuned = AutoRound(
        _loaded(source), AutoTokenizer.from_pretrained(source), layer_config=layers, iters=4, nsamples=8, seqlen=32,
        batch_size=4, dataset=data, device_map="cpu", **{"bits": 4, "group_size": 32, "sym": True} | options,
    )  # fmt: skip
    tuned.quantize_and_save(str(out), format="auto_round")
    for file in [file for folder in out.iterdir() if folder.is_dir() for file in folder.iterdir()]:
        file.rename(out / file.name)
    back = _loaded(out, dtype=torch.float16)
    # Its linears have no function that dequantizes: of the unit vectors they make the weight.
    return {
        name: linear(torch.eye(linear.infeatures, dtype=torch.float16)).t().float().detach()
        for name, linear in _linears(back).items() if hasattr(linear, "qweight")
    }  # fmt: skip


def llm_compressor(source: Path, out: Path, static: bool) -> Made:
    """GPTQ with 4 bits in groups, or 8 bits with static inputs and scales of a cache, on ids at random."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import CompressedTensorsConfig

    ids = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 32] * 16})
    scheme = {"targets": ["Linear"], "weights": QuantizationArgs(num_bits=4, strategy="group", group_size=32)}
    options: dict[str, Any] = {"ignore": ["lm_head"]}
    if static:
        one = QuantizationArgs(num_bits=8, strategy="tensor", dynamic=False)
        scheme |= {"weights": QuantizationArgs(num_bits=8, strategy="channel"), "input_activations": one}
        options["kv_cache_scheme"] = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False)
    modifier = (QuantizationModifier if static else GPTQModifier)(
        config_groups={"group_0": QuantizationScheme(**scheme)}, **options
    )
    model = oneshot(
        model=_loaded(source, dtype=torch.float32), dataset=data, recipe=modifier, num_calibration_samples=16,
        max_seq_length=32, pipeline="basic",
    )  # fmt: skip
    model.save_pretrained(out, save_compressed=True)
    back = _loaded(out, quantization_config=CompressedTensorsConfig(dequantize=True))
    return {name: linear.weight.detach().float() for name, linear in _linears(back).items()}


def _save(
    source: Path, out: Path, made: Mapping[str, Tensor], tensors: Mapping[str, Tensor], said: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """The tensors in place of the weights of the linears."""
    plain = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in plain.items() if name.removesuffix(".weight") not in made}
    out.mkdir(exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in (kept | dict(tensors)).items()}
    save_file(whole, out / "model.safetensors", metadata={"format": "pt", **(metadata or {})})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": said}
    (out / "config.json").write_text(json.dumps(config))


MAKERS: dict[str, Callable[[Path, Path], Made]] = {
    "hqq_4": hqq,
    "hqq_3": partial(hqq, bits=3, size=32, dtype="float16"),
    "hqq_2": partial(hqq, bits=2, size=16),
    "hqq_1": partial(hqq, bits=1, size=32),
    "hqq_8": partial(hqq, bits=8, size=128),
    "hqq_columns": partial(hqq, axis=0),
    **{f"torchao_{kind}": partial(torchao, kind=kind) for kind in
       ("int8", "int8_dyn", "int4", "int3_asym", "a8w4", "float8")},
    **{f"torchao_{kind}": partial(torchao_parts, kind=kind) for kind in ("mxfp4", "mxfp8", "nvfp4")},
    **{f"quark_{scheme}": partial(quark, scheme=scheme) for scheme in
       ("int4_wo_32", "uint4_wo_64", "int4_wo_per_channel", "uint4_wo_per_channel", "int8", "fp8", "mxfp4")},
    **{f"modelopt_{name.removesuffix('_CFG').lower()}": partial(modelopt, name=name) for name in
       ("NVFP4_DEFAULT_CFG", "MXFP4_DEFAULT_CFG", "INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG", "FP8_DEFAULT_CFG")},
    "compressed_w4a16": partial(compressed_tensors, preset="W4A16", form="pack-quantized"),
    "compressed_w4a16_asym": partial(compressed_tensors, preset="W4A16_ASYM", form="pack-quantized"),
    "compressed_w8a8": partial(compressed_tensors, preset="W8A8", form="int-quantized"),
    "compressed_nvfp4": partial(compressed_tensors, preset="NVFP4A16", form="nvfp4-pack-quantized"),
    "compressed_mxfp4": partial(compressed_tensors, preset="MXFP4A16", form="mxfp4-pack-quantized"),
    "gptq_4": gptqmodel,
    "gptq_act_order": partial(gptqmodel, desc_act=True, act_group_aware=False, sym=False),
    "gptq_v2": partial(gptqmodel, bits=8, format="gptq_v2"),
    "gptq_dynamic": partial(gptqmodel, dynamic={r".*\.up_proj": {"bits": 8, "group_size": 64}, r"-:.*\.q_proj": {}}),
    "auto_round_4": auto_round,
    "auto_round_settings": partial(auto_round, layers={"model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 64}}),
    "llm_compressor_w4a16": partial(llm_compressor, static=False),
    "llm_compressor_w8a8": partial(llm_compressor, static=True),
    "bnb_nf4": partial(bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb_fp4": partial(bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bnb_int8": partial(bitsandbytes, load_in_8bit=True),
}  # fmt: skip


def kept(folder: Path, made: Made) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is kept of a checkpoint: the tensors of one linear, its weight, and what config and header say of it."""
    config = json.loads((folder / "config.json").read_text())
    said = json.dumps(config.get("quantization_config") or json.loads((folder / "hf_quant_config.json").read_text()))
    (file,) = folder.glob("*.safetensors")
    linear = next(name for name in KEPT if name in made)
    with safe_open(file, framework="pt") as handle:
        found = {name: handle.get_tensor(name) for name in handle.keys() if name.startswith(f"{linear}.")}  # noqa: SIM118
        header = {key: text for key, text in (handle.metadata() or {}).items() if key.startswith(linear)}
    dequantized = made[linear].half() if torch.equal(made[linear].half().float(), made[linear]) else made[linear]
    return found | {"dequantized": dequantized.contiguous()}, {"said": said, "header": json.dumps(header)}


def main() -> None:
    target, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        source = small_model(Path(place) / "float")
        for name in names or MAKERS:
            out = Path(place) / name
            tensors, said = kept(out, MAKERS[name](source, out))
            save_file(tensors, Path(target) / f"{name}.safetensors", metadata=said)
            print(name, sorted(tensors))


if __name__ == "__main__":
    main()
