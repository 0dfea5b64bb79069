"""RWKV: weighted means by a Scan, beside transformers' model; a text in pieces; no padding."""

import onnx
import pytest
import torch

from helpers import agreement, exports
from helpers.random_decoders import reference_model, save_model
from helpers.runners import tokens, transformers_runner
from qexport.api.stages.capturing import capture_model
from qexport.errors import InputError
from qexport.recipe.recipe import Override, Recipe
from qexport.runtime.decoder import open_decoder

FLOAT = {"scheme": "w8a8_dyn", "overrides": (Override(match="*", scheme="float"),)}
ops = torch.ops.qexport


def drawn(tokens, spread=1.0):
    random = torch.Generator().manual_seed(0)
    decay, first = -torch.rand(4, generator=random).exp(), torch.randn(4, generator=random)
    key, value = (torch.randn(2, tokens, 4, generator=random) for _ in range(2))
    return decay, first, spread * key, value


@pytest.mark.parametrize("spread", [1.0, 60.0])  # exp(60 * 3) is no float32
def test_operator_is_the_weighted_mean(spread):
    decay, first, key, value = (x.double() for x in drawn(12, spread))
    out, _ = ops.wkv(*(x.float() for x in (decay, first, key, value)), torch.zeros(2, 3, 4))
    for t in range(12):
        exponents = [key[:, i] + (t - 1 - i) * decay for i in range(t)] + [key[:, t] + first]
        weights = torch.softmax(torch.stack(exponents), 0)
        want = sum(w * value[:, i] for i, w in enumerate(weights))
        assert (out[:, t] - want).abs().max() < 1e-5


def test_a_text_in_parts_is_the_text_at_once():
    decay, first, key, value = drawn(9)
    whole, end = ops.wkv(decay, first, key, value, torch.zeros(2, 3, 4))
    past, parts = torch.zeros(2, 3, 4), []
    for k, v in zip(key.split([1, 5, 3], 1), value.split([1, 5, 3], 1), strict=True):
        out, past = ops.wkv(decay, first, k, v, past)
        parts.append(out)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6) and torch.allclose(past, end, atol=1e-6)


@pytest.fixture(scope="module")
def of_floats(tmp_path_factory):
    place = tmp_path_factory.mktemp("rwkv")
    folder = save_model("rwkv", place / "model")
    return folder, exports.export(capture_model(folder), Recipe(**FLOAT), "cpu", place / "out")


def test_a_file_of_floats_is_transformers_model(of_floats):
    folder, exported = of_floats
    graph = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "Scan" for node in graph.node) == 2
    assert {node.domain for node in graph.node if "Conv" in node.op_type or "Attention" in node.op_type} <= {""}
    names = {value.name for value in graph.input}
    assert "attention_mask" not in names and {"past_conv.0", "past_recurrent.1"} <= names
    runs = (exported.in_onnxruntime(), transformers_runner(reference_model(folder)))
    mask = torch.ones(3, 7, dtype=torch.int64)
    got, want = agreement.logits(mask, *((run, exported.captured, torch.float32) for run in runs))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_it_reads_prompts_in_pieces_and_takes_no_padding(of_floats):
    decoder, ids = open_decoder(of_floats[1].folder), tokens(2, 9)
    whole = torch.from_numpy(decoder.run(ids.numpy()).copy())
    decoder.reset()
    pieces = [torch.from_numpy(decoder.run(part.numpy()).copy()) for part in ids.split([4, 3, 1, 1], 1)]
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-5 * whole.abs().max()
    with pytest.raises(InputError, match="has no attention mask, so it cannot take padding"):
        decoder.generate([[5, 6, 7], [5]], max_new_tokens=2)


@pytest.mark.slow
def test_weights_that_transformers_would_halve_stay(tmp_path):
    """Later layers in the range of float16, which a file of float32 does without: the same function."""
    folder = save_model("rwkv", tmp_path / "model", num_hidden_layers=4, rescale_every=2)
    exported = exports.export(capture_model(folder), Recipe(**FLOAT), "cpu", tmp_path / "out")
    runs = (exported.in_onnxruntime(), transformers_runner(reference_model(folder)))
    mask = torch.ones(2, 7, dtype=torch.int64)
    got, want = agreement.logits(mask, *((run, exported.captured, torch.float32) for run in runs))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
