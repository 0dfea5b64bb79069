"""What a model lacks is said in the first second, and files that only help never cost the export."""

import json
import shutil

import pytest

from helpers.random_decoders import save_model
from helpers.tokenizer_files import write_word_tokenizer
from qexport.api.exporting import export
from qexport.api.stages import capturing
from qexport.artifact.manifest import Manifest
from qexport.errors import InputError
from qexport.models.source import open_model
from qexport.runtime.genai import genai_config

SENTENCES = {
    "generation": "generation_config.json is left out",
    "card": "the licence that README.md may state is not carried over",
    "licence": "LICENSE is not a file and is left out",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small Llama with the token that ends texts in its configs, and a tokenizer."""
    folder = save_model("llama", tmp_path_factory.mktemp("whole"), eos_token_id=2)
    write_word_tokenizer(folder, vocab=64)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def without_end(folder):
    for name in ("config.json", "generation_config.json"):
        said = json.loads((folder / name).read_text())
        said.pop("eos_token_id", None)
        (folder / name).write_text(json.dumps(said))


def test_side_files_that_cannot_be_used_are_left_out(folder, tmp_path, caplog):
    (folder / "generation_config.json").write_text('{"eos_token_id": ')
    (folder / "README.md").write_bytes("---\nlicense: mit\n---\ngrün".encode("utf-16"))
    (folder / "LICENSE").mkdir()
    out = export(folder, "w8a16_g32", out_dir=tmp_path / "out").folder
    for sentence in SENTENCES.values():
        assert sum(sentence in message for message in caplog.messages) == 1
        assert any(sentence in said for said in json.loads((out / "report.json").read_text())["export"]["warnings"])
    assert (out / "genai_config.json").exists()
    assert not (out / "generation_config.json").exists() and not (out / "LICENSE").exists()


@pytest.mark.parametrize("front", ["a: [", "license: 2001-99-99", "&a [*a, *a]: {", "? [x]\n: y"])
def test_front_matter_of_a_card_that_is_no_yaml(folder, front):
    (folder / "README.md").write_text(f"---\n{front}\n---\n")
    (note,) = open_model(folder).notes
    assert "its front matter is not YAML" in note


def test_the_end_of_texts_is_the_tokenizers_where_no_config_names_it(folder, tmp_path, caplog):
    without_end(folder)
    out = export(folder, "w8a16_g32", out_dir=tmp_path / "out").folder
    assert caplog.messages == ["the configs name no eos_token_id, so it is the tokenizer's: 2 ('</s>')"]
    assert json.loads((out / "genai_config.json").read_text())["model"]["eos_token_id"] == 2


def test_no_end_and_no_tokenizer_cost_genai_only(folder, tmp_path, caplog):
    without_end(folder)
    for file in folder.glob("token*"):
        file.unlink()
    out = export(folder, "w8a16_g32", out_dir=tmp_path / "out").folder
    assert any("no tokenizer" in message for message in caplog.messages)
    assert any("nothing names the token that ends texts" in message for message in caplog.messages)
    assert (out / "model.onnx").exists() and not (out / "genai_config.json").exists()


def test_a_damaged_tokenizer_is_refused_before_capture(folder, tmp_path):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    stages = []
    with pytest.raises(InputError, match="its tokenizer is damaged .* remove the tokenizer's files"):
        export(folder, "w8a16_g32", out_dir=tmp_path / "out", progress=lambda *step: stages.append(step))
    assert not stages


def test_calibration_text_that_cannot_be_had_is_refused_before_capture(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(capturing, "capture_folder", lambda folder: pytest.fail("captured"))
    with pytest.raises(InputError, match="gone.txt: cannot read the calibration text: No such file"):
        export(folder, "w8a8_static", out_dir=tmp_path / "out", calibration="gone.txt")
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(InputError, match="calibration texts: text needs a tokenizer"):
        export(folder, "w8a8_static", out_dir=tmp_path / "out", calibration=["a text"])


def test_an_empty_list_of_ends_is_none():
    sizes = {"vocab_size": 8, "head_dim": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    manifest = Manifest(target="cpu", kind="decoder", settings=sizes)
    config = {"hidden_size": 2, "num_attention_heads": 1, "eos_token_id": []}
    assert genai_config(manifest, config, None, 5)["model"]["eos_token_id"] == 5
    with pytest.raises(InputError, match="no eos_token_id"):
        genai_config(manifest, config)
