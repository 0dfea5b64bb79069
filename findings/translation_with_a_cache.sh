#!/usr/bin/env bash
# transformers 5.23.0, PyTorch 2.13.0, CPU: the decoder of FSMT has a causal mask only where there is no cache. With
# use_cache=True the tokens of one call see those behind them, so the logits of the first change with the second; with
# use_cache=False they do not, nor do those of BART with either. A text that begins with several decoder_input_ids (a prefix)
# is continued otherwise with the cache than without.
#
# Exits with 0 while this is so, and with 1 when a version behaves otherwise.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - 2>/dev/null <<'PY'
import sys

import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, FSMTConfig, FSMTForConditionalGeneration

print("transformers", transformers.__version__, "torch", torch.__version__)
sizes = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}
torch.manual_seed(0)
words = {"langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64}
models = {
    "FSMT": FSMTForConditionalGeneration(FSMTConfig(**words, init_std=0.5, **sizes)),
    "BART": BartForConditionalGeneration(BartConfig(vocab_size=64, init_std=0.5, **sizes)),
}
source = torch.tensor([[5, 6, 7, 2]])
ok = True
for name, model in models.items():
    for cache in (True, False):
        with torch.no_grad():
            first, second = (
                model.eval()(input_ids=source, decoder_input_ids=torch.tensor([[2, token]]), use_cache=cache).logits[0, 0]
                for token in (8, 9)
            )
        apart = (first - second).abs().max().item()
        print(f"{name}, use_cache={cache}: logits of the first of two tokens differ by {apart:.4f} when the second changes")
        ok &= (apart > 0.01) == (name == "FSMT" and cache)
sys.exit(0 if ok else 1)
PY
