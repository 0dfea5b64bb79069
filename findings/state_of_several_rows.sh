#!/usr/bin/env bash
# transformers 5.23.0, PyTorch 2.13.0, CPU: RwkvForCausalLM reads one more token behind a state that it returned itself. With one
# row the logits of that step are those of the whole text. With several rows they are [rows, rows, vocabulary] where
# [rows, 1, vocabulary] was asked for, as the state of every row meets the token of every other, and for most rows none of the
# columns is near the logits of the whole text. Two tokens behind a state have the shape and the logits that one expects.
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
from transformers import RwkvConfig, RwkvForCausalLM

torch.manual_seed(0)
model = RwkvForCausalLM(RwkvConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, context_length=64)).eval()
print("transformers", transformers.__version__, "torch", torch.__version__)
ok = True
for rows in (1, 3):
    text = torch.randint(50, (rows, 7))
    with torch.no_grad():
        whole = model(text).logits
        state = model(text[:, :5], use_cache=True).state
        two = model(text[:, 5:], state=[part.clone() for part in state], use_cache=True).logits
        state = model(text[:, :6], use_cache=True).state
        one = model(text[:, 6:], state=state, use_cache=True).logits
    print(f"{rows} row(s): two tokens behind a state {tuple(two.shape)}, one token {tuple(one.shape)}")
    apart = (one - whole[:, -1:]).abs().amax(-1).amin(-1)  # of the nearest column, by row
    print("  the nearest column is off by", *(f"{x:.1e}" for x in apart))
    print("  two tokens are off by", f"{(two - whole[:, 5:]).abs().max():.1e}")
    ok &= two.shape == (rows, 2, 50) and one.shape == (rows, rows, 50)
    ok &= (two - whole[:, 5:]).abs().max() < 1e-4 and (apart[0] < 1e-4 if rows == 1 else apart.max() > 0.1)
sys.exit(0 if ok else 1)
PY
