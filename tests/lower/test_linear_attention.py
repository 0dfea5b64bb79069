"""Mamba and Mamba-2: linear attention with decay, the operator and the file beside transformers' model."""

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import agreement, exports
from helpers.breadth import quick
from helpers.cuda_placement.models import CPU, PROMPT
from helpers.random_decoders import reference_model, save_model
from helpers.runners import captured_runner, load_weights, next_feeds, padded, prompt_feeds, tokens, transformers_runner
from qexport.api.stages.capturing import capture_model
from qexport.artifact.cache_names import is_past, present_of
from qexport.recipe.recipe import Override, Recipe
from qexport.runtime.decoder import open_decoder

FLOAT = {"scheme": "w8a8_dyn", "overrides": (Override(match="*", scheme="float"),)}
MASKS = [padded([9, 4, 6], "left"), padded([7, 2, 5], "right"), torch.ones(1, 1, dtype=torch.int64)]
FAMILIES = ("mamba2", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h", "zamba2", "mamba", "jamba")
ops = torch.ops.qexport


def drawn(tokens, heads=4, groups=2, by_row=False):
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, tokens, groups, 3, generator=random) for _ in range(2))
    value, past = torch.randn(2, tokens, heads, 5, generator=random), torch.randn(2, heads, 3, 5, generator=random)
    decay = -2 * torch.rand(2, tokens, heads, *[3] * by_row, generator=random)
    return query, key, value, decay, past


def slowly(query, key, value, decay, past, scale):
    """The recurrence as it is defined, a number at a time, in float64."""
    out, state = torch.zeros(value.shape, dtype=torch.float64), past.double().clone()
    for b, t, h in torch.cartesian_prod(*map(torch.arange, value.shape[:3])).tolist():
        group = h * query.shape[2] // value.shape[2]
        for row in range(query.shape[3]):
            rate = decay[b, t, h] if decay.dim() == 3 else decay[b, t, h, row]
            state[b, h, row] *= rate.double().exp()
            state[b, h, row] += key[b, t, group, row].double() * value[b, t, h].double()
            out[b, t, h] += scale * query[b, t, group, row].double() * state[b, h, row]
    return out, state


@pytest.mark.parametrize("by_row", [False, True])
def test_operator_is_the_recurrence(by_row):
    values = drawn(70, by_row=by_row)  # more than one chunk
    (out, state), (want, end) = ops.gated_linear_attention(*values, 0.5), slowly(*values, 0.5)
    assert (out - want).abs().max() < 1e-5 and (state - end).abs().max() < 1e-5


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.booleans())
def test_a_text_in_parts_is_the_text_at_once(lengths, by_row):
    query, key, value, decay, past = drawn(sum(lengths), by_row=by_row)
    whole, end = ops.gated_linear_attention(query, key, value, decay, past, 1.0)
    parts = []
    for pieces in zip(*(x.split(lengths, 1) for x in (query, key, value, decay)), strict=True):
        out, past = ops.gated_linear_attention(*pieces, past, 1.0)
        parts.append(out)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5) and torch.allclose(past, end, atol=1e-5)


def test_decays_that_leave_nothing_are_no_nan():
    query, key, value, decay, past = drawn(70)
    out, state = ops.gated_linear_attention(query, key, value, decay * 1e4, past, 1.0)
    want, end = slowly(query, key, value, decay * 1e4, past, 1.0)
    assert (out - want).abs().max() < 1e-5 and (state - end).abs().max() < 1e-5


@pytest.fixture(scope="module", params=quick(["mamba2", "mamba"], among=FAMILIES))
def of_floats(request, tmp_path_factory):
    """A family's folder, and its export without quantization."""
    place = tmp_path_factory.mktemp(request.param)
    folder = save_model(request.param, place / "model")
    return folder, exports.export(capture_model(folder), Recipe(**FLOAT), "cpu", place / "out")


def test_a_file_of_floats_is_transformers_model(of_floats):
    folder, exported = of_floats
    graph = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph
    kinds = exported.manifest.settings["layer_types"]
    states = sum(kind in ("linear_attention", "hybrid") for kind in kinds)
    found = [node.op_type for node in graph.node]
    assert found.count("CausalConvWithState") == states > 0
    assert found.count("LinearAttention") + found.count("Scan") == states
    inputs = {value.name for value in graph.input if is_past(value.name)}
    assert len(inputs) == 2 * states + 2 * sum(kind in ("full_attention", "hybrid") for kind in kinds)
    assert inputs == {name for name in inputs if present_of(name) in {value.name for value in graph.output}}
    for mask in MASKS:
        runs = (exported.in_onnxruntime(), transformers_runner(reference_model(folder)))
        got, want = agreement.logits(mask, *((run, exported.captured, torch.float32) for run in runs))
        assert (got - want).abs().max() < 2e-5 * want.abs().max()


def test_a_prompt_in_pieces_is_the_prompt_at_once(of_floats):
    """In the graph and in the file; of Mamba transformers begins each piece with an empty state."""
    _, exported = of_floats
    ids = tokens(2, 9)
    decoder = open_decoder(exported.folder)
    whole = torch.from_numpy(decoder.run(ids.numpy()).copy())
    decoder.reset()
    pieces = [torch.from_numpy(decoder.run(part.numpy()).copy()) for part in ids.split([4, 3, 1, 1], 1)]
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-5 * whole.abs().max()
    run, made, past = captured_runner(load_weights(exported.captured)), [], {}
    for start, end in ((0, 5), (5, 8), (8, 9)):
        feeds = prompt_feeds(exported.captured, ids[:, start:end], torch.ones(2, end, dtype=torch.int64))
        feeds |= past | {"position_ids": torch.arange(start, end).expand(2, -1)}
        result = run(feeds)
        made.append(result["logits"])
        past = {name: tensor for name, tensor in next_feeds(feeds, result, ids[:, 0]).items() if is_past(name)}
    assert (torch.cat(made, 1) - whole).abs().max() < 1e-5 * whole.abs().max()


def test_a_scan_by_channel_is_attention_with_a_head_for_each():
    random = torch.Generator().manual_seed(0)
    x, dt = torch.randn(2, 7, 4, generator=random), torch.rand(2, 7, 4, generator=random)
    a, past = -torch.rand(4, 3, generator=random), torch.randn(2, 4, 3, generator=random)
    b, c = (torch.randn(2, 7, 3, generator=random) for _ in range(2))
    out, state = ops.selective_scan(x, dt, a, b, c, past)
    given = (c[:, :, None], b[:, :, None], (x * dt)[..., None], dt[..., None] * a, past[..., None])
    want, end = slowly(*given, 1.0)
    assert (out - want[..., 0]).abs().max() < 1e-5 and (state - end[..., 0]).abs().max() < 1e-5


@pytest.mark.parametrize("family", quick(["mamba"], among=["mamba", "jamba"]))
def test_on_cuda_a_scan_is_one_kernel(captured, cuda_placement, tmp_path, family):
    recipe = Recipe(scheme="w4a16_g32", weights={"method": "rtn"})
    exported = exports.export(captured(family), recipe, "cuda", tmp_path / "out")
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert placed["memcpy"] == 0 and placed["optimized_ops"]["LinearAttention"] == 2
    assert "Scan" not in placed["optimized_ops"] and "LinearAttention" not in placed["nodes"].get(CPU, {})
