"""Small GGUF files written from small Llamas, as llama.cpp's converter writes them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.numpy import load_file
from transformers import AutoConfig

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    model: Path, file: Path, *, change: Callable[[dict], None] = lambda _: None,
    kind: Callable[[str], str] = lambda _: "F32", **fields,
) -> Path:  # fmt: skip
    """Write a folder's Llama as a GGUF file with a tokenizer of single characters.

    Args:
        change: edits the tensors by their names in the file.
        kind: the type of a tensor by its name, as gguf calls it; gguf's own quantizer makes its blocks.
        fields: further integers, floats and strings of its metadata, by key with `__` for a dot.
    """
    config = AutoConfig.from_pretrained(model)
    tensors = {_name(n): _stored(n, t, config) for n, t in load_file(model / "model.safetensors").items()}
    change(tensors)
    writer = GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(0x100 + i) for i in range(config.vocab_size - 1)), "Āā"])
    writer.add_token_merges(["Ā ā"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in fields.items():
        add = {int: writer.add_uint16, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key.replace("__", "."), value)
    for name, tensor in tensors.items():
        stored = GGMLQuantizationType[kind(name)]
        raw = None if stored == GGMLQuantizationType.F32 else stored
        data = np.ascontiguousarray(tensor) if raw is None else quantize(tensor, stored)
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{leaf}"
    _, _, number, inner = module.split(".", 3)
    return f"blk.{number}.{_NAMES[inner]}.{leaf}"


def _stored(name: str, tensor: np.ndarray, config) -> np.ndarray:
    """Rows of queries and keys go in pairs in the file, and in halves in transformers."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
