"""A small model with a tokenizer, and an export of it."""

import shutil
from pathlib import Path

import pytest

import qexport
from helpers.random_decoders import save_model
from helpers.tokenizer_files import write_word_tokenizer

VOCAB = 98


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = save_model("llama", tmp_path_factory.mktemp("model") / "tiny", vocab_size=VOCAB)
    write_word_tokenizer(folder, VOCAB)
    return folder


@pytest.fixture(scope="session")
def exported(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "tiny"
    qexport.export(model, "w4a16_g32_rtn", out_dir=out)
    return out


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))
