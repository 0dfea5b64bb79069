"""A small model with a tokenizer, and an export of it."""

import shutil
from pathlib import Path

import pytest

import qexport


@pytest.fixture(scope="session")
def model(model_with_tokenizer) -> Path:
    return model_with_tokenizer


@pytest.fixture(scope="session")
def exported(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "tiny"
    qexport.export(model, "w4a16_g32_rtn", out_dir=out)
    return out


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))
