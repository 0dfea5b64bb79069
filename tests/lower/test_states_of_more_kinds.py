"""States of more kinds of models: the operators of their recurrences, and the files beside transformers' models."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from helpers import agreement, exports
from helpers.breadth import quick
from helpers.random_decoders import reference_model, save_model
from helpers.runners import captured_runner, load_weights, padded, tokens, transformers_runner
from qexport.api.stages.capturing import capture_model
from qexport.recipe.recipe import Override, Recipe
from qexport.runtime.decoder import open_decoder

FLOAT = {"scheme": "w8a8_dyn", "overrides": (Override(match="*", scheme="float"),)}
MASKS = [padded([9, 4, 6], "left"), padded([7, 2, 5], "right"), torch.ones(1, 1, dtype=torch.int64)]
KINDS = ("xlstm", "recurrent_gemma", "minimax", "kimi_linear", "bailing_hybrid", "inkling", "inkling2", "zaya")
ops = torch.ops.qexport


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_parts(op, given, past, *others):
    """The same by three calls, the state of one handed to the next."""
    made = []
    for part in zip(*(x.float().split([1, 7, 4], 1) for x in given), strict=True):
        out, past = op(*part, past, *others)
        made.append(out)
    return torch.cat(made, 1), past


def test_gated_channels_are_the_sum_of_what_gates_leave():
    gate, x = torch.sigmoid(drawn(2, 12, 3)), drawn(2, 12, 3, seed=1)
    out, end = in_parts(ops.linear_recurrence, (gate, x), torch.zeros(2, 3))
    for t in range(12):
        want = sum(gate[:, i + 1 : t + 1].prod(1) * x[:, i] for i in range(t + 1))
        assert (out[:, t] - want).abs().max() < 1e-5
    assert torch.equal(end, out[:, -1])


@pytest.mark.parametrize("loud", [1.0, 50.0])  # exp(3 * 50) is no float32
def test_a_matrix_memory_is_the_weighted_sum_of_values(loud):
    query, key, value = drawn(2, 12, 3, 4), drawn(2, 12, 3, 4, seed=1), drawn(2, 12, 3, 5, seed=2)
    gate, forget = loud * drawn(2, 12, 3, seed=3), drawn(2, 12, 3, seed=4)
    given = query, key, value, gate, forget
    out, _ = in_parts(ops.matrix_lstm, given, torch.zeros(2, 3, 4, 7), 0.5, 0.0)
    kept = logsigmoid(forget)
    for t in range(12):
        left = torch.stack([kept[:, i + 1 : t + 1].sum(1) + gate[:, i] for i in range(t + 1)])  # [i, batch, heads]
        scores = torch.stack([(query[:, t] * key[:, i]).sum(-1) * 0.5 for i in range(t + 1)])
        top = left.amax(0)
        # m begins with 0 in front of a text, and decays.
        top = torch.maximum(top, kept[:, : t + 1].sum(1))
        weights = (left - top).exp() * scores
        total = sum(w[..., None] * value[:, i] for i, w in enumerate(weights))
        under = torch.maximum(weights.sum(0).abs(), (-top).exp())
        assert (out[:, t] - total / under[..., None]).abs().max() < 1e-4 * (total / under[..., None]).abs().max()


def test_a_delta_rule_may_decay_by_feature():
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    query, key, value = (drawn(2, 12, 3, 4, seed=i).float() for i in range(3))
    key = key / key.norm(dim=-1, keepdim=True)
    decay, beta = -torch.sigmoid(drawn(2, 12, 3, 4, seed=3)).float(), torch.sigmoid(drawn(2, 12, 3, seed=4)).float()
    out, end = in_parts(ops.gated_delta_rule, (query, key, value, decay, beta), torch.zeros(2, 3, 4, 4), 0.5)
    want, state = chunk_kimi_delta_attention(query, key, value, g=decay, beta=beta, output_final_state=True)
    assert torch.allclose(out, want, atol=1e-5) and torch.allclose(end, state, atol=1e-5)


@pytest.mark.parametrize("family", quick(["recurrent_gemma"], among=KINDS))
def test_a_file_of_floats_is_transformers_model(tmp_path, family):
    folder = save_model(family, tmp_path / "model")
    exported = exports.export(capture_model(folder), Recipe(**FLOAT), "cpu", tmp_path / "out")
    assert exported.manifest.settings["attention"] == "standard"
    # Without a mask that it reads, xLSTM takes padding for text, in transformers as here.
    masks = MASKS if family != "xlstm" else [torch.ones(3, 9, dtype=torch.int64)]
    for mask in masks:
        runs = (exported.in_onnxruntime(), transformers_runner(reference_model(folder)))
        got, want = agreement.logits(mask, *((run, exported.captured, torch.float32) for run in runs))
        assert (got - want).abs().max() < 2e-5 * want.abs().max()
    decoder, ids = open_decoder(exported.folder), tokens(2, 9)
    whole = torch.from_numpy(decoder.run(ids.numpy()).copy())
    decoder.reset()
    pieces = [torch.from_numpy(decoder.run(part.numpy()).copy()) for part in ids.split([4, 3, 1, 1], 1)]
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.slow
def test_what_stands_for_the_token_in_front_of_the_first_may_have_a_bias(tmp_path):
    folder = save_model("zaya", tmp_path / "model", attention_bias=True)
    captured = capture_model(folder)
    runs = (captured_runner(load_weights(captured)), transformers_runner(reference_model(folder)))
    for mask in MASKS[1:]:  # transformers convolves biases of the padding in front
        got, want = agreement.logits(mask, *((run, captured, torch.float32) for run in runs))
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
