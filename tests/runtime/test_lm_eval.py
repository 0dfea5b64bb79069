"""lm-eval scores an export as it lies there: the sample task against scores from the logits of our own session."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from helpers.random_decoders import save_model
from helpers.tokenizer_files import write_word_tokenizer
from qexport.api.exporting import export
from qexport.runtime.decoder import open_decoder

ROOT = Path(__file__).parent.parent.parent
TASK = ROOT / "samples" / "lm_eval_task"
DOCS = [json.loads(line) for line in (TASK / "everyday.jsonl").read_text().splitlines()]


def test_the_sample_task_is_well_formed():
    for doc in DOCS:
        assert len(set(doc["choices"])) == 4 and doc["whole"] == f"{doc['text']} {doc['choices'][doc['label']]}."
    assert {doc["label"] for doc in DOCS} == {0, 1, 2, 3} and len({doc["text"] for doc in DOCS}) == len(DOCS)


@pytest.mark.skipif(
    find_spec("lm_eval") is None or find_spec("onnxruntime_genai") is None,
    reason="lm-eval or onnxruntime-genai is not installed",
)
def test_scores_are_those_of_our_own_session(tmp_path):
    model = save_model("llama", tmp_path / "model")
    write_word_tokenizer(model)
    folder = export(model, "w4a16_g32_rtn", out_dir=tmp_path / "out").folder
    command = [
        sys.executable, "-m", "lm_eval", "--model", "onnxruntime-genai", "--model_args", f"pretrained={folder}",
        "--tasks", "everyday,everyday_perplexity", "--include_path", TASK, "--output_path", tmp_path / "scores",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "scores").rglob("results*.json")
    found = json.loads(path.read_text())["results"]
    scores = by_hand(folder)
    assert found["everyday"]["acc,none"] == pytest.approx(scores["acc"])
    assert found["everyday"]["acc_norm,none"] == pytest.approx(scores["acc_norm"])
    assert found["everyday_perplexity"]["bits_per_byte,none"] == pytest.approx(scores["bits_per_byte"], rel=1e-4)


def by_hand(folder: Path) -> dict[str, float]:
    tokenizer, decoder = AutoTokenizer.from_pretrained(folder), open_decoder(folder, threads=1)

    def costs(ids: list[int]) -> np.ndarray:
        """Log-probability of every token but the first."""
        decoder.reset()
        logits = decoder.run(np.array([ids]))[0, :-1].astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
        return shifted[np.arange(len(ids) - 1), ids[1:]]

    right = normed = bits = size = 0
    for doc in DOCS:
        start = len(tokenizer.encode(doc["text"], add_special_tokens=False))
        texts = [f"{doc['text']} {choice}" for choice in doc["choices"]]
        likely = [costs(tokenizer.encode(text, add_special_tokens=False))[start - 1 :].sum() for text in texts]
        right += np.argmax(likely) == doc["label"]
        lengths = [len(choice) for choice in doc["choices"]]
        normed += np.argmax(np.array(likely) / lengths) == doc["label"]
        whole = tokenizer.encode(doc["whole"], add_special_tokens=False)
        bits -= costs([tokenizer.bos_token_id, *whole]).sum() / math.log(2)
        size += len(doc["whole"].encode())
    return {"acc": right / len(DOCS), "acc_norm": normed / len(DOCS), "bits_per_byte": bits / size}
