"""A witness that holds one module's weights at a time says what one says that holds them all."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qexport.capture.folder import capture_folder
from qexport.models.layerwise import StoredWeights, open_layerwise
from qexport.models.source import open_model
from qexport.models.transformers_witness import decoder, loading
from qexport.validation.reader import check_reader


@pytest.mark.parametrize("family", ["llama_bias", "qwen3_moe", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_oss", "deepseek_v3", "mixtral", "gpt2")
)])  # fmt: skip
def test_it_says_the_same(model_folder, monkeypatch, family):
    whole = check_reader(capture_folder(open_model(model_folder(family))))
    monkeypatch.setattr(decoder, "SMALL", 0)
    found = check_reader(capture_folder(open_model(model_folder(family))))
    assert found.why_not == "" and "a module at a time" in found.sentence()
    assert found.weights == whole.weights > 0


def test_no_more_than_a_module_is_held(model_folder, monkeypatch):
    model, _ = open_layerwise(AutoModelForCausalLM, open_model(model_folder("qwen3_moe")))
    read, most = StoredWeights.read, []

    def watched(self, name, row=None):
        most.append([n for n, p in model.named_parameters() if not p.is_meta])
        return read(self, name, row)

    monkeypatch.setattr(StoredWeights, "read", watched)
    with torch.no_grad():
        model(input_ids=torch.arange(6)[None])
    assert max(map(len, most)) <= 1 and not [p for p in model.parameters() if not p.is_meta]


def test_where_it_cannot_be_read_so_the_model_is_loaded(model_folder, monkeypatch):
    monkeypatch.setattr(decoder, "SMALL", 0)
    monkeypatch.setattr(loading, "open_layerwise", lambda *_: {}["no such weight"])
    found = check_reader(capture_folder(open_model(model_folder("llama_bias"))))
    assert found.why_not == "" and "a module at a time" not in found.sentence()
