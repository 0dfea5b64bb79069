"""ONNX files of a small Llama as other tools write them: the model builder of onnxruntime-genai, and forms by hand."""

import contextlib
import io
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.tokenizer_files import write_word_tokenizer

LAYERS = 3


def float_model(folder: Path, inner: int = 96) -> Path:
    """A random Llama of three layers with a tokenizer, so that linears have others like them.

    Args:
        inner: outputs of gate_proj. The builder takes a linear with as many as there are tokens, 128, for the last one.
    """
    config = LlamaConfig(
        hidden_size=64, intermediate_size=inner, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=128, initializer_range=0.15, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    write_word_tokenizer(folder, 97)
    return folder


def by_the_builder(model: Path, folder: Path, **options) -> Path:
    """What `python -m onnxruntime_genai.models.builder` writes in 4 bits for the CPU."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    before, logging.root.manager.disable = logging.root.manager.disable, logging.CRITICAL
    offline = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            made = (None, str(model), str(folder), "int4", "cpu", str(folder / "cache"))
            create_model(*made, **parse_extra_options(*made, [f"{key}={value}" for key, value in options.items()]))
    finally:
        logging.root.manager.disable = before
        os.environ.pop("HF_HUB_OFFLINE") if offline is None else os.environ.update(HF_HUB_OFFLINE=offline)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return folder


def by_torch(model: Path, folder: Path, opset: int | None = None) -> Path:
    """What torch.onnx writes of the model without a cache: logits of token ids and a mask."""
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    ids = torch.arange(32).view(2, 16)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("sequence", min=2, max=512)}
    names = ("input_ids", "attention_mask")
    folder.mkdir()
    torch.onnx.export(
        Logits().eval(), (ids, torch.ones_like(ids)), str(folder / "model.onnx"), dynamo=True, input_names=names,
        output_names=["logits"], dynamic_shapes={name: sizes for name in names}, external_data=False,
        opset_version=opset,
    )  # fmt: skip
    return folder


def by_nncf(float_file: Path, folder: Path) -> Path:
    """NNCF's 4-bit weights of a float file. With all_layers it makes a product of the table of embeddings, over ids,
    and ONNX Runtime refuses the file."""
    import nncf

    folder.mkdir()
    settings = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 32}
    onnx.save(nncf.compress_weights(onnx.load(float_file), **settings), folder / "model.onnx")
    return folder


def by_olive(float_file: Path, folder: Path) -> Path:
    """Olive's 4-bit weights of a float file, by its pass that rounds to nearest."""
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.rtn_quantization import OnnxBlockWiseRtnQuantization

    settings = {"bits": 4, "block_size": 32, "is_symmetric": True}
    made = create_pass_from_dict(OnnxBlockWiseRtnQuantization, settings, disable_search=True)
    made.run(ONNXModelHandler(model_path=str(float_file)), str(folder))
    return folder


def by_modelopt(float_file: Path, folder: Path) -> Path:
    """ModelOpt's 4-bit weights of a float file, rounded to nearest. Of opset 20, which torch.onnx takes by itself, it
    writes DequantizeLinear with blocks, which that opset has not, and ONNX Runtime refuses the file."""
    from modelopt.onnx.quantization.int4 import quantize

    folder.mkdir()
    made = quantize(str(float_file), calibration_method="rtn_dq", block_size=32)
    onnx.save(made, folder / "model.onnx")
    return folder


def by_mobius(model: Path, folder: Path) -> Path:
    """What mobius builds: float, with a cache."""
    subprocess.run([sys.executable, "-m", "mobius", "build", "--model", model, folder], check=True, capture_output=True)
    return folder


def changed(source: Path, folder: Path, change: Callable[[ModelProto], None]) -> Path:
    """A copy of a folder whose model was changed, all of it in one file."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.data", "report.*"))
    model = onnx.load(source / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")
    return folder


def edit(model: ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the tensor of that name."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


def swap(model: ModelProto, first: str, second: str) -> None:
    """Put two tensors in each other's place."""
    one, two = (next(t for t in model.graph.initializer if t.name == name) for name in (first, second))
    one.name, two.name = second, first


def without_names(model: ModelProto) -> None:
    """Nodes, tensors and values are numbered, and nothing says whose they are."""
    graph, new = model.graph, {}
    kept = {value.name for value in (*graph.input, *graph.output)}

    def renamed(name: str) -> str:
        return name if not name or name in kept else new.setdefault(name, f"v{len(new)}")

    for node in graph.node:
        node.name = ""
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    del graph.value_info[:]


def renamed_ports(model: ModelProto) -> None:
    """Inputs and outputs under the names that torch.onnx gives them, tokens as int32."""
    names = {"input_ids": "tokens", "attention_mask": "mask", "logits": "output_0"}
    for index in range(LAYERS):
        for kind in ("key", "value"):
            names[f"past_key_values.{index}.{kind}"] = f"past_{kind}_{index}"
            names[f"present.{index}.{kind}"] = f"new_{kind}_cache_{index}"
    for value in (*model.graph.input, *model.graph.output):
        value.name = names[value.name]
        if value.name == "tokens":
            value.type.tensor_type.elem_type = TensorProto.INT32
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
