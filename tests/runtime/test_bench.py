import json
from pathlib import Path

import numpy as np
import pytest

from helpers.onnx_decoder import write_tiny_decoder
from qexport.errors import InputError, RuntimeProblem
from qexport.runtime.bench_process import BenchProcess
from qexport.runtime.benchmark import DECODE_TURNS, bench, measure
from qexport.runtime.genai import genai_config

QUICK = {"prompt_lengths": (8, 16), "decode_pasts": (4,), "repeats": 2, "threads": 1}


def test_bench_compares_an_export_with_a_folder_of_the_model_builder(tmp_path):
    large = write_tiny_decoder(tmp_path / "large", hidden=256, vocab=2048)
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    write_tiny_decoder(tmp_path / "small")
    # The builder leaves no manifest, only genai_config.json.
    (tmp_path / "large" / "genai_config.json").write_text(json.dumps(genai_config(large, config)))
    (tmp_path / "large" / "manifest.json").unlink()

    result = bench(tmp_path / "large", tmp_path / "small", **QUICK)

    first, second = result.first, result.second
    assert set(first.prefill) == {8, 16} and set(first.decode) == {4}
    assert {key: len(values) for key, values in first.samples.items()} == {
        "load": 2, "prefill:8": 2, "prefill:16": 2, "decode:4": 2 * DECODE_TURNS
    }  # fmt: skip
    assert min(map(min, first.samples.values())) > 0
    sizes = [(tmp_path / "large" / name).stat().st_size for name in ("model.onnx", "model.onnx.data")]
    assert first.model_bytes == sum(sizes)
    assert first.memory_bytes > second.memory_bytes > 0
    assert result.ratios["prefill:16"] == first.prefill[16] / second.prefill[16] < 1
    assert result.ratios["model_bytes"] > 1
    assert set(result.ratios) == {"load_seconds", "memory_bytes", "model_bytes", "prefill:8", "prefill:16", "decode:4"}
    assert first.spread["load"] == pytest.approx(abs(np.diff(first.samples["load"])[0]) / 2 / first.load_seconds)
    assert set(first.spread) == set(first.samples) and result.notes == ()
    json.dumps(result.as_dict())


def test_folders_are_measured_there_and_back_and_the_first_turn_is_not_counted(tmp_path, monkeypatch):
    calls, steps_taken = [], []

    class Recorded(BenchProcess):
        def load(self):
            calls.append(("load", self._folder.name))
            return super().load()

        def prefill(self, tokens, batch):
            calls.append((tokens, self._folder.name))
            return super().prefill(tokens, batch)

        def decode(self, steps):
            steps_taken.append(self._folder.name)
            return super().decode(steps)

    monkeypatch.setattr("qexport.runtime.benchmark.BenchProcess", Recorded)
    for name in "abc":
        write_tiny_decoder(tmp_path / name)
    found, _ = measure([tmp_path / name for name in "abc"], **QUICK)
    assert "".join(name for _, name in calls) == 4 * "cbaabccba"
    assert [what for what, _ in calls] == [what for what in ("load", 4, 8, 16) for _ in range(9)]
    # The steps behind the prompts of one repeat go back and there as well.
    there, back = (turns * (DECODE_TURNS // 2) for turns in ("abccba", "cbaabc"))
    assert "".join(steps_taken) == there + back + there
    assert [Path(m.folder).name for m in found] == list("abc")
    assert all(len(m.samples["prefill:8"]) == 2 for m in found)


@pytest.mark.slow
def test_batches_are_measured_besides_one_prompt_alone(tmp_path):
    write_tiny_decoder(tmp_path, shared_cache=True)
    result = bench(tmp_path, tmp_path, **QUICK, batches=[3])
    first, keys = result.first, {"prefill:8x3", "prefill:16x3", "decode:4x3"}
    assert set(first.prefill) == {8, 16} and set(first.decode) == {4} and set(first.batched) == keys
    assert keys < set(first.samples) and keys < set(result.ratios)
    assert first.batched["prefill:16x3"] == pytest.approx(48 / np.median(first.samples["prefill:16x3"]))
    assert first.batched["decode:4x3"] == pytest.approx(3 / np.median(first.samples["decode:4x3"]))


@pytest.mark.slow
def test_defaults_stop_where_the_context_of_a_model_does(tmp_path):
    write_tiny_decoder(tmp_path / "long", layers=1, max_length=300)
    write_tiny_decoder(tmp_path / "short", layers=1, max_length=140, shared_cache=True)
    result = bench(tmp_path / "long", tmp_path / "short", repeats=1, threads=1)
    assert list(result.first.prefill) == [128, 140] and list(result.first.decode) == [108]
    assert result.notes == (
        "a prompt of 512 tokens became 140: the model reads 140",
        "decoding 32 tokens after 128 tokens became 108: the model reads 140",
    )
    with pytest.raises(InputError, match="short: .*141 tokens does not fit.*140"):
        bench(tmp_path / "long", tmp_path / "short", prompt_lengths=[141])
    with pytest.raises(InputError, match="after 109 tokens does not fit.*Ask for 108"):
        bench(tmp_path / "long", tmp_path / "short", decode_pasts=[109])


def test_folder_that_computes_the_last_logits_alone_and_takes_no_positions_is_measured(tmp_path):
    write_tiny_decoder(tmp_path, layers=1, positions=False, last_logits=True, shared_cache=True)
    assert bench(tmp_path, **QUICK).first.decode[4] > 0


@pytest.mark.slow
def test_bench_of_one_folder_has_no_ratios(tmp_path):
    write_tiny_decoder(tmp_path, shared_cache=True)
    result = bench(tmp_path, **QUICK | {"prompt_lengths": (8,), "repeats": 1})
    assert result.second is None and result.ratios == {}
    assert result.first.prefill[8] == 8 / result.first.samples["prefill:8"][0]


def test_folder_that_does_not_load_is_named_in_the_error(tmp_path):
    write_tiny_decoder(tmp_path / "good")
    write_tiny_decoder(tmp_path / "bad")
    (tmp_path / "bad" / "model.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeProblem, match="bad.*refuses the model"):
        bench(tmp_path / "good", tmp_path / "bad", **QUICK)


def test_wrong_requests_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="not an export"):
        bench(tmp_path)
    with pytest.raises(InputError, match="1 or more"):
        bench(tmp_path, repeats=0)
    with pytest.raises(InputError, match="1 or more"):
        bench(tmp_path, prompt_lengths=(0,))
    manifest = write_tiny_decoder(tmp_path, layers=1)
    path = tmp_path / "manifest.json"
    path.write_text(manifest.model_copy(update={"kind": "module"}).model_dump_json())
    with pytest.raises(InputError, match="bench measures decoders"):
        bench(tmp_path)
