"""A decoder that reads shorter texts than its model: smaller tables, the same bits."""

import onnx
import pytest
import torch

import qexport
from helpers.random_modules import save_encoder
from qexport.artifact.manifest import MODEL_FILE
from qexport.errors import InputError
from qexport.runtime.session import open_session
from qexport.validation.running import run_session


def tables(folder):
    """Rows of the rotary tables of a file, each table once."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    return [tensor.dims[0] for tensor in model.graph.initializer if tensor.name.startswith("rotary.")]


def logits(made, tokens):
    session = open_session(made.folder, made.manifest, threads=1)
    places = torch.arange(tokens.shape[1])[None]
    feeds = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "position_ids": places}
    sizes = made.manifest.settings
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feeds[value.name] = torch.zeros(1, sizes["num_key_value_heads"], 0, sizes["head_dim"])
    names = {value.name for value in session.get_inputs()}
    return run_session(session, {name: value for name, value in feeds.items() if name in names}, ["logits"])["logits"]


def test_both_kinds_of_tables_are_there_once_and_as_long_as_asked(model_folder, export_folder, tmp_path):
    folder = model_folder("gemma3")
    whole = qexport.export(folder, "w4a16_g32_rtn", out_dir=tmp_path / "whole")
    short = qexport.export(folder, "w4a16_g32_rtn", out_dir=tmp_path / "short", max_length=48)
    context = whole.manifest.settings["max_position_embeddings"]
    assert tables(whole.folder) == [context] * 4
    assert tables(short.folder) == [48] * 4
    assert short.manifest.settings["max_position_embeddings"] == 48
    tokens = torch.arange(40)[None] % 32
    assert torch.equal(logits(whole, tokens), logits(short, tokens))
    report = qexport.validate(short.folder, folder, windows=2)
    assert report.logits.window == 48
    with pytest.raises(InputError, match="a window of 49 tokens is longer than the 48 that the file reads"):
        qexport.validate(short.folder, folder, window=49)


@pytest.mark.parametrize(
    ("length", "why"), [(0, "a text cannot have 0 tokens"), (1 << 20, "the model reads .* tokens, not 1048576")]
)
def test_lengths_that_mean_nothing_are_refused(model_folder, tmp_path, length, why):
    with pytest.raises(InputError, match=why):
        qexport.export(model_folder("gemma3"), "w4a16_g32_rtn", out_dir=tmp_path / "out", max_length=length)


def test_only_decoders_have_a_longest_text(tmp_path, run):
    folder = save_encoder("bert", tmp_path / "bert")
    code, _, stderr = run("export", folder, "-o", tmp_path / "out", "-r", "w8a8_dyn", "--max-length", "32")
    assert code == 2
    assert "only decoders have a maximum length, and this is an encoder" in stderr
