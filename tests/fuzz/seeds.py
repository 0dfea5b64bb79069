"""Whole inputs to damage: tiny models in the forms in which people bring them, and an export of one."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

import qexport
from helpers.random_decoders import save_random

SIZES = {"vocab_size": 256, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES = {
    "llama": {"model_type": "llama", "intermediate_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2", "num_hidden_layers": 2},
    "gemma3": {"model_type": "gemma3_text", "intermediate_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 2,
               "head_dim": 16, "sliding_window": 8},
    "mixtral": {"model_type": "mixtral", "intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2,
                "num_local_experts": 4, "num_experts_per_tok": 2},
    "bert": {"model_type": "bert", "intermediate_size": 96, "num_hidden_layers": 2},
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{{ 'assistant:' }}"
RECIPE = """name: mine
scheme: w8a8_static
lm_head: w8a16_g32
weights:
  method: gptq
  damp: 0.01
smooth:
  alpha: 0.5
calibration:
  samples: 2
  sequence_length: 16
overrides:
  - match: "*.down_proj"
    scheme: w8a16_g32
"""


def make(folder: Path) -> None:
    """Write models under their families' names, `model.gguf`, `text.txt`, `recipe.yaml` and the export `export`."""
    for name, config in FAMILIES.items():
        loader = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
        tokens = {} if name == "bert" else TOKENS
        save_random({**SIZES, **tokens, **config}, folder / name, loader)
        _tokenizer().save_pretrained(folder / name)
    _shard(folder / "llama", folder / "sharded")
    _gguf(folder / "llama", folder / "model.gguf")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    (folder / "recipe.yaml").write_text(RECIPE)
    torch.manual_seed(0)
    qexport.export(folder / "llama", "w8a16_g32", out_dir=folder / "export")
    qexport.validate(folder / "export", folder / "llama", windows=1, window=16, greedy=2)


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:250]
    merges = [(a, b) for a, b in ("th", "in", "er")]
    tokens = ["<pad>", "<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    made.add_special_tokens({})
    return made


def _shard(source: Path, folder: Path) -> None:
    """The same model in two files and an index."""
    folder.mkdir()
    tensors, weight_map = load_file(source / "model.safetensors"), {}
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    for part in (0, 1):
        name = f"model-{part + 1:05d}-of-00002.safetensors"
        held = {key: value for i, (key, value) in enumerate(sorted(tensors.items())) if i % 2 == part}
        save_file(held, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, name)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _gguf(source: Path, file: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(vocabulary) - 3))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.numpy().astype(np.float32)
        kept = values if values.ndim == 1 else values.astype(np.float16)
        writer.add_tensor(_gguf_name(name), kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    parts = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name


