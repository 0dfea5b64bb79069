"""Indexers: what they choose, in PyTorch and in ONNX Runtime, and models in which attention reads that alone."""

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch.fx import Graph, GraphModule

from helpers import agreement, exports
from helpers.random_decoders import reference_model, save_model
from helpers.runners import captured_runner, load_weights, padded, tokens, transformers_runner
from qexport.api.stages.capturing import capture_model
from qexport.artifact.cache_names import is_past
from qexport.capture.graph import Port
from qexport.errors import InputError
from qexport.graph.edit import TensorSpec
from qexport.lower.build import build_model
from qexport.lower.lowered_block import LoweredBlock
from qexport.recipe.recipe import Override, Recipe
from qexport.runtime.decoder import open_decoder
from qexport.targets.cpu import CpuTarget

FLOAT = {"scheme": "w8a8_dyn", "overrides": (Override(match="*", scheme="float"),)}
MASKS = [padded([9, 4, 6], "left"), padded([7, 2, 5], "right"), torch.ones(1, 1, dtype=torch.int64)]
INDEXED = "indexed_attention"
COUNT = 4  # index_topk of these models
ops = torch.ops.qexport


@pytest.fixture(scope="module")
def session():
    """`highest` as a file."""
    graph, dims = Graph(), ("batch", "new", "total")
    scores = graph.placeholder("scores")
    scores.meta = {"spec": TensorSpec(torch.float32, dims)}
    places = graph.call_function(ops.highest.default, (scores, COUNT))
    places.meta = {"spec": TensorSpec(torch.int64, (*dims[:2], "chosen"))}
    graph.output((places,))
    module = GraphModule(torch.nn.Module(), graph)
    piece = LoweredBlock("choice", module, ["scores"], ["places"], lambda name: None)
    ports = [Port("scores", "scores", torch.float32, dims)], [Port("places", "places", torch.int64, (*dims[:2], "c"))]
    model = build_model([piece], *ports, CpuTarget(), "0").model
    return ort.InferenceSession(ir.to_proto(model).SerializeToString())


@pytest.mark.parametrize("total", [1, 3, COUNT, 5, 40])
def test_of_equal_scores_the_first_are_chosen(session, total):
    drawn = torch.randint(-2, 3, (2, 6, total), generator=torch.Generator().manual_seed(total)) / 4
    drawn = torch.where(drawn == 0, torch.tensor([0.0, -0.0]).repeat(total)[:total], drawn)  # two zeros, equal
    got = ops.highest(drawn, COUNT)
    for row, places in zip(drawn.flatten(0, 1).tolist(), got.flatten(0, 1).tolist(), strict=True):
        assert places == sorted(range(total), key=lambda place: (-row[place], place))[:COUNT]
    assert torch.equal(torch.from_numpy(session.run(None, {"scores": drawn.numpy()})[0]), got)


def test_attention_reads_what_was_chosen_whatever_the_padding(tmp_path):
    folder = save_model(
        "deepseek_v32", tmp_path / "model", num_hidden_layers=1, mlp_layer_types=["dense"], layer_types=[INDEXED]
    )
    captured = capture_model(folder)
    pasts = {port.name: port.dims[1:] for port in captured.inputs if is_past(port.name)}
    assert pasts["past_indexer.0"] == (1, "past_sequence_length", 16) and len(pasts) == 3
    model, reference = load_weights(captured), reference_model(folder)
    assert MASKS[0].shape[1] > COUNT > MASKS[2].shape[1]
    for mask in MASKS:
        runs = (captured_runner(model), transformers_runner(reference))
        got, want = agreement.logits(mask, *((run, captured, torch.float32) for run in runs))
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
    reference.config.index_topk = reference.model.layers[0].self_attn.indexer.index_topk = 100
    runs = (captured_runner(model), transformers_runner(reference))
    got, everything = agreement.logits(MASKS[0], *((run, captured, torch.float32) for run in runs))
    assert (got - everything).abs().max() > 0.01 * want.abs().max()


TURNS = ["full", "full", "shared", "full", "shared"]
SHARED = {"num_hidden_layers": 5, "indexer_types": TURNS, "layer_types": [INDEXED] * 5}
SHARED["mlp_layer_types"] = ["dense"] * 5
SUMMED = ["heavily_compressed_attention", "compressed_sparse_attention"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "kinds"),
    [("glm_moe_dsa", SHARED, [INDEXED if turn == "full" else "full_attention" for turn in TURNS]),
     ("deepseek_v4", {"num_hidden_layers": 2, "layer_types": SUMMED, "mlp_layer_types": ["moe"] * 2}, SUMMED)],
)  # fmt: skip
def test_a_file_of_floats_is_transformers_model(tmp_path, family, changes, kinds):
    folder = save_model(family, tmp_path / "model", **changes)
    exported = exports.export(capture_model(folder), Recipe(**FLOAT), "cpu", tmp_path / "out")
    assert exported.manifest.settings["layer_types"] == kinds
    for mask in MASKS:
        runs = (exported.in_onnxruntime(), transformers_runner(reference_model(folder)))
        got, want = agreement.logits(mask, *((run, exported.captured, torch.float32) for run in runs))
        assert (got - want).abs().max() < 2e-5 * want.abs().max()
    decoder, ids = open_decoder(exported.folder), tokens(2, 9)
    whole = torch.from_numpy(decoder.run(ids.numpy()).copy())
    decoder.reset()
    pieces = [torch.from_numpy(decoder.run(part.numpy()).copy()) for part in ids.split([2, 4, 1, 2], 1)]
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-5 * whole.abs().max()
    assert decoder.forgets
    decoder.cut(5)  # keys of the indexer too
    again = torch.from_numpy(decoder.run(ids[:, 5:].numpy()).copy())
    assert (again - whole[:, 5:]).abs().max() < 1e-5 * whole.abs().max()
    if kinds == SUMMED:
        with pytest.raises(InputError, match="puts padding into summaries of tokens, so it cannot take padding"):
            decoder.generate([[5, 6, 7], [5]], max_new_tokens=2)
    else:
        assert len(decoder.generate([[5, 6, 7], [5]], max_new_tokens=2).tokens) == 2
