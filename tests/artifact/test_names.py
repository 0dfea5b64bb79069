"""Files that travel do not say where things lay on the machine that made them."""

import os

import pytest

from helpers.tokenizer_files import write_word_tokenizer
from qexport import validate
from qexport.api.exporting import export
from qexport.artifact.names import public_name
from qexport.recipe.recipe import Recipe


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/model", "org/model"), ("self", "self"), ("datasets:a/b:train:text", "datasets:a/b:train:text"),
        ("/home/me/text.txt", "text.txt"), ("../x/text.txt", "text.txt"), ("~/models/tiny/", "tiny"),
    ],
)  # fmt: skip
def test_of_a_path_the_last_part_is_told(given, expected):
    assert public_name(given) == expected


def test_an_export_and_its_validation_keep_no_path(model_folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in model_folder("llama").iterdir():
        (source / path.name).symlink_to(path)
    write_word_tokenizer(source, vocab=97)
    text = tmp_path / "text.txt"
    text.write_text("The moon has phases because the sun lights one half of it. " * 20)
    recipe = Recipe.load("w8a8_static").with_calibration(samples=2, sequence_length=16)
    folder = export(source, recipe, out_dir=tmp_path / "out", calibration=str(text)).folder
    validate(folder, source, text=text, windows=2, window=16, greedy=0)
    assert "source: text.txt" in (folder / "recipe.yaml").read_text()
    for path in folder.rglob("*"):
        if path.is_file():
            assert os.fsencode(tmp_path) not in path.read_bytes(), path.name
