"""Decoders whose layers keep the inputs of a causal convolution: operator, file, and what a runtime does with it."""

import json

import onnx
import pytest
import torch

from helpers import agreement, exports
from helpers.random_decoders import reference_model, save_model
from helpers.runners import padded, tokens, transformers_runner
from helpers.tokenizer_files import write_word_tokenizer
from qexport import Drafts, validate
from qexport.api.stages.capturing import capture_model
from qexport.errors import InputError, LoweringError
from qexport.recipe.recipe import Override, Recipe
from qexport.runtime.decoder import open_decoder
from qexport.runtime.transformers_js import _check

MASKS = [padded([9, 4, 6], "left"), padded([7, 2, 5], "right"), torch.ones(1, 1, dtype=torch.int64)]
FLOAT = {"scheme": "w8a8_dyn", "overrides": (Override(match="*", scheme="float"),)}
ops = torch.ops.qexport


def test_a_text_in_parts_is_the_text_at_once():
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 6, 7, generator=random), torch.randn(6, 1, 4, generator=random)
    bias, past = torch.randn(6, generator=random), torch.zeros(2, 6, 3)
    whole, end = ops.causal_convolution(x, weight, bias, past)
    want = torch.nn.functional.conv1d(torch.nn.functional.pad(x, (3, 0)), weight, bias, groups=6)
    assert torch.allclose(whole, want, atol=1e-6) and torch.equal(end, x[:, :, -3:])
    parts = []
    for part in x.split([1, 4, 2], dim=2):
        out, past = ops.causal_convolution(part, weight, bias, past)
        parts.append(out)
    assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-6) and torch.equal(past, end)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_model("lfm2", tmp_path_factory.mktemp("lfm2"))
    write_word_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def of_floats(folder, tmp_path_factory):
    return exports.export(capture_model(folder), Recipe(**FLOAT), "cpu", tmp_path_factory.mktemp("out") / "float")


def test_a_file_of_floats_is_transformers_model(folder, of_floats):
    for mask in MASKS:
        runs = (of_floats.in_onnxruntime(), transformers_runner(reference_model(folder)))
        got, want = agreement.logits(mask, *((run, of_floats.captured, torch.float32) for run in runs))
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_interface(of_floats):
    graph = onnx.load(of_floats.folder / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "CausalConvWithState" for node in graph.node) == 3
    inputs = {value.name for value in graph.input} - {"input_ids", "attention_mask", "position_ids"}
    assert inputs == {f"past_conv.{i}" for i in (0, 1, 3)} | {f"past_key_values.2.{part}" for part in ("key", "value")}
    settings = of_floats.manifest.settings
    assert settings["layer_types"] == ["conv", "conv", "full_attention", "conv"] and settings["conv_cache_size"] == 2
    config = json.loads((of_floats.folder / "genai_config.json").read_text())["model"]
    assert config["type"] == "lfm2" and config["decoder"]["inputs"]["past_conv_names"] == "past_conv.%d"
    assert config["decoder"]["layer_types"] == settings["layer_types"]


def test_states_are_forgotten_between_texts_and_rows_do_not_touch(folder, of_floats):
    decoder, model = open_decoder(of_floats.folder), reference_model(folder)
    ids = tokens(1, 9)[0].tolist()
    want = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 9:].tolist()
    for _ in range(2):
        assert list(decoder.generate([ids], max_new_tokens=8).tokens[0]) == want
    alone = decoder.generate([ids[:4]], max_new_tokens=8).tokens[0]
    assert decoder.generate([ids, ids[:4]], max_new_tokens=8).tokens == (tuple(want), alone)


def test_what_has_to_forget_tokens_is_refused(folder, of_floats, tmp_path):
    decoder = open_decoder(of_floats.folder)
    decoder.run(tokens(1, 4).numpy())
    with pytest.raises(InputError, match="which cannot forget the last tokens"):
        decoder.cut(2)
    with pytest.raises(InputError, match="cannot forget a wrong guess"):
        decoder.generate([[5, 6, 7]], max_new_tokens=4, drafts=Drafts())
    with pytest.raises(InputError, match="which transformers.js keeps in another size"):
        _check(of_floats.folder, of_floats.manifest)
    with pytest.raises(LoweringError, match="something other than attention reads the attention mask"):
        exports.exporting.export(folder, "compact_kv8", out_dir=tmp_path / "out", calibration="random")


@pytest.mark.slow
def test_it_is_quantized_and_validated(folder, tmp_path):
    result = exports.exporting.export(folder, "w8a16", out_dir=tmp_path / "out")
    report = validate(result.folder, folder, window=32, windows=2)
    assert not report.problems and report.reader.difference < 1e-4
    assert report.logits.kl_median < 1e-3  # some tokens of this random model hang on the last bits of its gains
    assert len(result.manifest.linears) == 22  # all but the output projection
