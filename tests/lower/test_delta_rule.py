"""Decoders with layers that learn by the gated delta rule: the operator, and the file beside transformers' model."""

import onnx
import pytest
import torch

from helpers import agreement, exports
from helpers.breadth import quick
from helpers.random_decoders import reference_model, save_model
from helpers.runners import padded, transformers_runner
from qexport.api.stages.capturing import capture_model
from qexport.recipe.recipe import Override, Recipe

FLOAT = {"scheme": "w8a8_dyn", "overrides": (Override(match="*", scheme="float"),)}
MASKS = [padded([9, 4, 6], "left"), padded([7, 2, 5], "right"), torch.ones(1, 1, dtype=torch.int64)]
ops = torch.ops.qexport


def drawn(tokens):
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, tokens, 3, 4, generator=random) for _ in range(2))
    value = torch.randn(2, tokens, 3, 5, generator=random)
    decay, beta = -torch.rand(2, tokens, 3, generator=random), torch.rand(2, tokens, 3, generator=random)
    return query, key / key.norm(dim=-1, keepdim=True), value, decay, beta


def test_it_is_transformers_rule_and_a_text_in_parts_is_the_text_at_once():
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    given = drawn(70)  # more than one of transformers' chunks
    whole, end = ops.gated_delta_rule(*given, torch.zeros(2, 3, 4, 5), 0.5)
    named = dict(zip(("query", "key", "value", "g", "beta"), given, strict=True))
    want, state = torch_chunk_gated_delta_rule(**named, output_final_state=True)
    assert torch.allclose(whole, want, atol=1e-5) and torch.allclose(end, state, atol=1e-5)
    past, parts = torch.zeros(2, 3, 4, 5), []
    for place in (slice(0, 1), slice(1, 50), slice(50, 70)):
        out, past = ops.gated_delta_rule(*(x[:, place] for x in given), past, 0.5)
        parts.append(out)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6) and torch.allclose(past, end, atol=1e-6)


@pytest.mark.parametrize("family", quick(["olmo_hybrid"], among=["qwen3_next", "qwen3_5", "olmo_hybrid"]))
def test_a_file_of_floats_is_transformers_model(tmp_path, family):
    kinds = ["linear_attention", "full_attention"]
    folder = save_model(family, tmp_path / "model", num_hidden_layers=2, layer_types=kinds)
    exported = exports.export(capture_model(folder), Recipe(**FLOAT), "cpu", tmp_path / "out")
    graph = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph
    assert exported.manifest.settings["layer_types"] == kinds
    found = [node.op_type for node in graph.node]
    assert found.count("LinearAttention") == 1 and found.count("CausalConvWithState") == 1
    for mask in MASKS:
        runs = (exported.in_onnxruntime(), transformers_runner(reference_model(folder)))
        got, want = agreement.logits(mask, *((run, exported.captured, torch.float32) for run in runs))
        assert (got - want).abs().max() < 2e-5 * want.abs().max()
