#!/usr/bin/env bash
# transformers 5.23.0, PyTorch 2.13.0, CPU: the decoder of MoonshineStreaming adds its positions to the very states that
# it is handed (encoder_hidden_states += ...), so that a second call with the same encoder_outputs reads them twice.
# With a cache this is not seen, as the keys and values are those of the first call; without one every step is another.
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
from transformers import MoonshineStreamingConfig, MoonshineStreamingForConditionalGeneration

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2}
encoder = {**sizes, "head_dim": 16, "sliding_windows": [[4, 2]]}
config = MoonshineStreamingConfig(vocab_size=50, decoder_start_token_id=1, **sizes, encoder_config=encoder)
model = MoonshineStreamingForConditionalGeneration(config).eval()
torch.nn.init.normal_(model.model.decoder.pos_emb.weight)
with torch.no_grad():
    states = model.get_encoder()(torch.randn(1, 1600))
    first, second = (
        model(encoder_outputs=states, decoder_input_ids=torch.tensor([[1]])).logits for _ in range(2)
    )
apart = ((first - second).abs().max() / first.abs().max()).item()
print(f"two calls with the same states differ by {apart:.2f} of the largest logit")
sys.exit(0 if apart > 0.01 else 1)
PY
