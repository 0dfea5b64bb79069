#!/usr/bin/env bash
# transformers 5.23.0, PyTorch 2.13.0, CPU: a Falcon with ALiBi (alibi=True) gives other logits with
# attn_implementation="eager" than with "sdpa". The same weights without ALiBi agree in both; given the bias by
# distance as a mask, once, they have the logits of "sdpa", and given it twice those of "eager". So a float
# reference taken in "eager" is another model.
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
from transformers import AutoModelForCausalLM, FalconConfig
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

ROWS, TOKENS, HEADS, HIDDEN = 2, 12, 4, 64


def model(attention: str, alibi: bool):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS)
    made = AutoModelForCausalLM.from_config(
        FalconConfig(**sizes, alibi=alibi, multi_query=False), attn_implementation=attention
    ).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
    return made


torch.manual_seed(1)
tokens = torch.randint(50, (ROWS, TOKENS))
bias = build_alibi_tensor(torch.ones(ROWS, TOKENS), HEADS, torch.float32).view(ROWS, HEADS, 1, TOKENS)
causal = torch.full((TOKENS, TOKENS), torch.finfo(torch.float32).min).triu(1)
still = torch.zeros(ROWS, TOKENS, dtype=torch.long)  # without ALiBi Falcon rotates by position: none at 0
with torch.no_grad():
    with_alibi = {name: model(name, True)(tokens).logits for name in ("eager", "sdpa")}
    plain = {name: model(name, False)(tokens).logits for name in ("eager", "sdpa")}
    by_mask = {
        times: model("sdpa", False)(
            tokens, attention_mask=causal + times * bias / (HIDDEN // HEADS) ** 0.5, position_ids=still
        ).logits
        for times in (1, 2)
    }
off = lambda a, b: (a - b).abs().max().item()
print("transformers", transformers.__version__, "torch", torch.__version__)
print(f"eager and sdpa without ALiBi {off(*plain.values()):.1e}, with it {off(*with_alibi.values()):.1e}")
for name, logits in with_alibi.items():
    print(f"{name} beside the bias once {off(logits, by_mask[1]):.1e}, twice {off(logits, by_mask[2]):.1e}")
right = off(*plain.values()) < 1e-4 and off(*with_alibi.values()) > 0.01
right &= off(with_alibi["sdpa"], by_mask[1]) < 1e-3 and off(with_alibi["eager"], by_mask[2]) < 1e-3
sys.exit(0 if right else 1)
PY
