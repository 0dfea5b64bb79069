"""Small random models of real families, saved as folders that a user could have downloaded."""

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCAB, HIDDEN = 128, 64

_SIZES = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_GROUPED = _SIZES | dict(intermediate_size=96, num_key_value_heads=2)
_GEMMA = _GROUPED | dict(head_dim=16, query_pre_attn_scalar=32, sliding_window=4)

# What each family is here for stands beside it.
_CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),  # grouped-query attention
    "llama_bias": lambda: transformers.LlamaConfig(
        **_GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, head_dim=16, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),  # biases on q, k and v only
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=16),  # norms of q and k
    "gemma3": lambda: transformers.Gemma3TextConfig(  # gains of 1 + w, scaled embeddings, two kinds of layers
        **_GEMMA | dict(num_hidden_layers=3), layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gemma2": lambda: transformers.Gemma2Config(**_GEMMA),  # soft caps of scores and logits
    "opt": lambda: transformers.OPTConfig(  # LayerNorm, ReLU, learned positions
        **_SIZES | dict(ffn_dim=96, word_embed_proj_dim=HIDDEN)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(  # one linear for q, k and v; partial rotary; parallel residual
        **_SIZES, intermediate_size=96, rotary_pct=0.25, use_parallel_residual=True
    ),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED),  # q, k, v and gate, up in one linear each
}
FAMILIES = tuple(_CONFIGS)

# Attention that transformers does not let anybody replace (ALiBi, an own cache), or a part without a translation.
UNSUPPORTED = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4
    ),
    "gptj": lambda: transformers.GPTJConfig(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, rotary_dim=8),
    "gpt_oss": lambda: transformers.GptOssConfig(**_GROUPED, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
}


def save_model(family: str, folder: Path, *, seed: int = 0, **changes) -> Path:
    """Save a random model of a family as config.json and model.safetensors.

    Args:
        changes: of its config, e.g. num_hidden_layers.
    """
    config = (_CONFIGS | UNSUPPORTED)[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    model.save_pretrained(folder)
    return folder


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights under which every part matters: values of order 1 everywhere, gains and biases away from 1 and 0.

    Two channels of each gain are large, so that activations have the outliers that smoothing is for.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter is embedding:
                parameter.copy_(draw(*parameter.shape))
            elif parameter.dim() >= 2:
                parameter.copy_(draw(*parameter.shape) / parameter.shape[-1] ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(parameter + 0.2 * draw(*parameter.shape))
                parameter[3], parameter[-5] = 6.0, -4.0
            else:
                parameter.copy_(0.3 * draw(*parameter.shape))


def reference_model(folder: Path) -> torch.nn.Module:
    """The float model as transformers runs it, attention written out."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()
