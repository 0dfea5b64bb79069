#!/usr/bin/env bash
# transformers 5.23.0, PyTorch 2.13.0, CPU: PaliGemma on Gemma 1, called without token_type_ids (which are optional), is
# causal with attn_implementation="eager" and reads its whole prompt in both directions with "sdpa", the default: the
# logits of the two differ, and with "sdpa" those of a token change with the tokens behind it. With token_type_ids of
# zeros, as the processor makes them, the two agree, and both read in both directions. So a float reference that leaves
# them out depends on the attention that it was loaded with.
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
from transformers import AutoModelForImageTextToText, PaliGemmaConfig

PICTURE = 127
CONFIG = dict(
    image_token_index=PICTURE, hidden_size=64, projection_dim=64, vocab_size=128,
    vision_config=dict(
        model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, image_size=16, patch_size=8, vision_use_head=False,
    ),
    text_config=dict(
        model_type="gemma", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    ),
)


def model(attention):
    torch.manual_seed(0)
    made = AutoModelForImageTextToText.from_config(PaliGemmaConfig(**CONFIG), attn_implementation=attention).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.2)
    return made


torch.manual_seed(1)
ids = torch.tensor([[1] + [PICTURE] * 4 + [5, 6, 7]])
other = ids.clone()
other[0, -1] = 50  # the last token alone
pixels = torch.randn(1, 3, 16, 16)
off = lambda a, b: (a - b).abs().max().item()
made = {}
for attention in ("eager", "sdpa"):
    m = model(attention)
    with torch.no_grad():
        for name, more in (("without", {}), ("with", {"token_type_ids": torch.zeros_like(ids)})):
            first, second = (m(input_ids=tokens, pixel_values=pixels, **more).logits for tokens in (ids, other))
            made[attention, name] = first, off(first[:, :-1], second[:, :-1])
print("transformers", transformers.__version__, "torch", torch.__version__)
for (attention, name), (_, moved) in made.items():
    print(f"{attention}, {name} token_type_ids: another last token moves logits in front of it by {moved:.1e}")
between = {name: off(made["eager", name][0], made["sdpa", name][0]) for name in ("without", "with")}
print(f"eager and sdpa, without {between['without']:.1e}, with {between['with']:.1e}")
right = made["eager", "without"][1] == 0 and made["sdpa", "without"][1] > 0.01
right &= made["eager", "with"][1] > 0.01 and made["sdpa", "with"][1] > 0.01
right &= between["without"] > 0.01 and between["with"] < 1e-3
sys.exit(0 if right else 1)
PY
