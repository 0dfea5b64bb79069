"""Windows of a text for models that expect its end."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from helpers.tokenizer_files import write_word_tokenizer
from qexport.calibrate.encoder_inputs import with_last_token

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def ended(template, tmp_path):
    write_word_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if template:
        specials = [("<s>", 1), ("</s>", 2)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    return with_last_token(IDS, SimpleNamespace(origin=SimpleNamespace(tokenizer=lambda: tokenizer)))


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>"])
def test_the_end_takes_the_place_of_the_last_token(template, tmp_path):
    assert ended(template, tmp_path).tolist() == [[5, 6, 2], [8, 9, 2]]


@pytest.mark.parametrize("template", ["", "<s> $A"])
def test_texts_without_an_end_stay_as_they_are(template, tmp_path):
    assert ended(template, tmp_path).tolist() == IDS.tolist()


def test_a_model_without_a_tokenizer_has_no_end():
    assert with_last_token(IDS, SimpleNamespace(origin=SimpleNamespace(tokenizer=lambda: None))) is IDS
