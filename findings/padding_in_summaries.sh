#!/usr/bin/env bash
# transformers 5.23.0, PyTorch 2.13.0, CPU: DeepseekV4ForCausalLM with layers of heavily_compressed_attention. Padding in
# front of a text, masked and with positions that leave it out, goes into the windows that are compressed and moves
# where they begin, so it changes the logits. A last token that is read in a call of its own gives others than in the
# call of the whole text too: a call of one token attends to every entry, one of several to those before its position.
# Without padding both agree.
#
# Exits with 0 while this is so, and with 1 when a version behaves otherwise.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 torch==2.13.0 transformers==5.23.0
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - 2>/dev/null <<'PY'
import sys

import torch
import transformers
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = DeepseekV4Config(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16, q_lora_rank=16,
    moe_intermediate_size=16, n_routed_experts=2, num_experts_per_tok=1, sliding_window=4, o_groups=2, o_lora_rank=8,
    layer_types=["heavily_compressed_attention"], mlp_layer_types=["moe"], pad_token_id=0,
    compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 3},
)
model = DeepseekV4ForCausalLM._from_config(config, attn_implementation="eager").eval()
for weight in model.parameters():
    torch.nn.init.normal_(weight, std=0.5)
text = torch.randint(3, 64, (1, 7))


def last(padding):
    """Logits behind the last token: of the whole text in a call, and of that token behind the others."""
    ids = torch.cat([torch.zeros(1, padding, dtype=torch.int64), text], 1)
    mask = torch.tensor([[0] * padding + [1] * 7])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=places).logits[:, -1]
        first = model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=places[:, :-1], use_cache=True)
        cache = first.past_key_values
        step = model(ids[:, -1:], attention_mask=mask, position_ids=places[:, -1:], past_key_values=cache).logits[:, -1]
    return whole, step


(whole, step), (padded, padded_step) = last(0), last(2)
largest = whole.abs().max()
same, moved, apart = ((one - other).abs().max().item() / largest.item() for one, other in (
    (whole, step), (whole, padded), (padded, padded_step),
))
print(f"of the largest logit: a step and a prompt differ by {same:.0e}, padding changes {moved:.2f}, "
      f"and with it a step and a prompt differ by {apart:.2f}")
sys.exit(0 if same < 1e-4 and moved > 0.1 and apart > 0.1 else 1)
PY
