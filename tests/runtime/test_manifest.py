import json

import pytest

from helpers.onnx_decoder import write_tiny_decoder
from qexport.artifact import manifest as manifests
from qexport.errors import InputError


def test_manifest_survives_saving_and_loading(tmp_path):
    written = write_tiny_decoder(tmp_path)
    assert manifests.load(tmp_path) == written
    assert written.linears[0].shape == (64, 64)


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "not an export"),
        (lambda folder: (folder / "model.onnx").unlink(), "incomplete"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "unreadable"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "not a JSON object"),
        (lambda folder: edit(folder, format=2, qexport="9.0", surprise=1), "format 2 by qexport 9.0.*Upgrade"),
        (lambda folder: edit(folder, target=""), "damaged manifest: target"),
        (lambda folder: edit(folder, session={"session.x": 4}), "damaged manifest: session.session.x"),
        (lambda folder: edit(folder, surprise=1), "damaged manifest: surprise"),
    ],
)
def test_folder_that_cannot_be_used_is_an_input_error(tmp_path, damage, words):
    write_tiny_decoder(tmp_path, layers=1)
    damage(tmp_path)
    with pytest.raises(InputError, match=words):
        manifests.load(tmp_path)


def test_missing_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        manifests.load(tmp_path / "nowhere")


def test_genai_folder_gives_its_config_entries_and_no_file_to_load_code_from(tmp_path):
    decoder = {
        "session_options": {
            "log_id": "x",
            "custom_ops_library": "evil.so",
            "ep.cuda.fpa_intb_gemm": "1",
            "intra_op_num_threads": 3,
            "provider_options": [{"cuda": {}}],
        },
        "filename": "../elsewhere/decoder.onnx",
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "head_size": 16,
    }
    config = {"model": {"decoder": decoder, "vocab_size": 97}, "search": {"past_present_share_buffer": True}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    found = manifests.load_genai(tmp_path)
    assert found.session == {"ep.cuda.fpa_intb_gemm": "1"}
    assert found.provider == manifests.CUDA
    assert found.settings["filename"] == "decoder.onnx"
    assert found.settings["past_present_share_buffer"] is True


def test_genai_folder_without_a_decoder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="neither"):
        manifests.load_genai(tmp_path)
    (tmp_path / "genai_config.json").write_text('{"model": {"encoder": {}}}')
    with pytest.raises(InputError, match="decoder"):
        manifests.load_genai(tmp_path)
