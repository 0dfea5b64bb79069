#!/usr/bin/env bash
# transformers 5.23.0, PyTorch 2.13.0, CPU: MambaForCausalLM and FalconMambaForCausalLM read several tokens behind
# a cache that they returned themselves as if the scan began there. One token at a time behind the same cache has
# the logits of the whole text; four tokens in one call have others, with no error or warning. A prompt read in
# pieces, or drafts that are checked in one call, come out wrong.
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
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
right = True
for config, kind in ((MambaConfig, MambaForCausalLM), (FalconMambaConfig, FalconMambaForCausalLM)):
    torch.manual_seed(0)
    model = kind(config(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8)).eval()
    tokens = torch.randint(50, (1, 16))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
        whole = model(tokens).logits[:, 12:]
        cache = model(tokens[:, :12], use_cache=True).cache_params
        several = model(tokens[:, 12:], cache_params=cache, use_cache=True).logits
        cache = model(tokens[:, :12], use_cache=True).cache_params
        single = [model(tokens[:, i : i + 1], cache_params=cache, use_cache=True).logits for i in range(12, 16)]
    off = [(logits - whole).abs().max().item() for logits in (torch.cat(single, 1), several)]
    print(f"{kind.__name__}: one by one {off[0]:.1e}, four in a call {off[1]:.1e}, of logits up to {whole.abs().max():.1f}")
    right &= off[0] < 1e-3 and off[1] > 0.1
sys.exit(0 if right else 1)
PY
