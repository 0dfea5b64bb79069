"""A study of encoder-decoders: they write about the prompts."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import qexport
from helpers.random_modules import VOCAB, save_seq2seq
from helpers.tokenizer_files import write_word_tokenizer
from qexport.errors import InputError
from qexport.runtime.seq2seq import open_seq2seq, texts_as_source

PROMPTS = ("a long text", "the moon and more")
FLOAT = qexport.Recipe(scheme="w8a16", overrides=[{"match": "*", "scheme": "float"}])


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = save_seq2seq("t5", tmp_path_factory.mktemp("model") / "t5", gain=2.0)
    write_word_tokenizer(folder, VOCAB)
    return folder


def test_a_study_of_pairs(t5, export_folder, tmp_path):
    for name, recipe in (("exact", FLOAT), ("w4", "w4a16_g32_rtn")):
        qexport.export(t5, recipe, out_dir=tmp_path / name)
    grid = qexport.Grid(temperatures=(0, 0.9), top_ks=(0,), max_new_tokens=(8,), seeds=(4,))
    folders = [tmp_path / "exact", tmp_path / "w4"]
    found = qexport.study(folders, t5, grid=grid, prompts=PROMPTS, threads=1)
    rows = {(row.format, row.temperature): row for row in found.rows}
    assert [form.name for form in found.formats] == ["float", "exact", "w4"] and found.reference == "t5"
    for temperature in (0, 0.9):
        same, coarse = rows["exact", temperature], rows["w4", temperature]
        assert same.distance < 1e-4 and same.prefix_share == 1 and same.perplexity_ratio == 1
        assert coarse.distance > 0.02 or coarse.prefix_share < 1
    # What is drawn is what the export draws elsewhere, and its perplexity is transformers' own.
    ids = [AutoTokenizer.from_pretrained(t5)(text)["input_ids"] for text in PROMPTS]
    pair, model, costs = open_seq2seq(tmp_path / "w4", threads=1), AutoModelForSeq2SeqLM.from_pretrained(t5), []
    for prompt in ids:
        pair.read(texts_as_source(pair, [prompt]))
        text = pair.decoder.generate([[0]], max_new_tokens=8, eos_token_ids=[2]).tokens[0]
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *text[:-1]]])
            ).logits[0]  # fmt: skip
        costs.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(text))))
    assert rows["w4", 0].perplexity == pytest.approx(np.exp(np.mean(costs)), rel=1e-4)
    decoder = export_folder("llama", qexport.Recipe(scheme="w8a16_g32"))
    with pytest.raises(InputError, match="no encoder-decoder, as others of these are"):
        qexport.study([tmp_path / "w4", decoder], t5)


@pytest.mark.slow
def test_models_of_speech_are_refused(t5, tmp_path):
    whisper = save_seq2seq("whisper", tmp_path / "whisper")
    given = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    qexport.export(whisper, "w8a8_dyn", out_dir=tmp_path / "speech", calibration=given)
    with pytest.raises(InputError, match="its sources are input_features, and the prompts of a study are texts"):
        qexport.study([tmp_path / "speech"], whisper)
    with pytest.raises(InputError, match="is not the model in .*speech"):
        qexport.study([tmp_path / "speech"], t5)
