"""GroupQueryAttention in the exported file: every family, any padding, one shared buffer."""

import numpy as np
import onnx
import pytest
import torch

from helpers import exports
from helpers.agreement import logits
from helpers.random_decoders import FAMILIES
from helpers.runners import captured_runner, load_weights, padded, tokens
from qexport.api.exporting import export as export_model
from qexport.artifact.manifest import MODEL_FILE
from qexport.errors import InputError
from qexport.graph.edit import call
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe
from qexport.runtime.decoder import Decoder, open_decoder
from qexport.runtime.session import open_session

aten = torch.ops.aten
FLOAT = Recipe(
    scheme="w8a8_dyn", overrides=(Override(match="*", scheme="float"),), calibration=CalibrationSpec(source="random")
)
OUTSIDE = {"opt", "gpt_neox"}  # learned positions, and tables too narrow for the operator

WINDOWS = {"mistral", "gemma2", "gemma3"}


@pytest.fixture
def export(captured, tmp_path):
    def make(family, **options):
        return exports.export(captured(family), FLOAT, "cpu", tmp_path / str(options), **options)

    return make


def nodes(exported):
    model = onnx.load(exported.folder / MODEL_FILE, load_external_data=False)
    return [node.op_type for node in model.graph.node], [value.name for value in model.graph.input]


@pytest.mark.parametrize("family", FAMILIES)
def test_float_models_keep_their_logits_with_padding_on_either_side(export, family):
    exported = export(family)
    layers = exported.captured.settings["num_hidden_layers"]
    found, inputs = nodes(exported)
    assert found.count("GroupQueryAttention") == layers and "Attention" not in found
    assert ("position_ids" in inputs) == (family in OUTSIDE)
    assert ("RotaryEmbedding" in found) == (family == "gpt_neox")
    single = [torch.float32] * 3
    for side in ("left", "right"):
        runners = (exported.in_onnxruntime(), exported.in_pytorch(), captured_runner(load_weights(exported.captured)))
        runs = [(run, exported.captured, dtype) for run, dtype in zip(runners, single, strict=True)]
        ran, graph, reference = logits(padded([9, 4, 6], side), *runs)
        assert (ran - graph).abs().max() < 1e-5 * reference.abs().max()
        # The window of the graph before the rewriting counts padding that stands between tokens, as nobody wants.
        if side == "left" or family not in WINDOWS:
            assert (ran - reference).abs().max() < 1e-5 * reference.abs().max()


def test_padding_where_none_may_be_gives_nan_and_not_numbers(export):
    exported = export("llama")
    run = exported.in_onnxruntime()
    ids = tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]])
    empty = {
        port.name: torch.zeros(2, port.dims[1], 0, port.dims[3])
        for port in exported.captured.inputs
        if port.name.startswith("past")
    }
    found = run({"input_ids": ids, "attention_mask": mask, **empty})["logits"]
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_a_shared_buffer_gives_what_growing_caches_give(export):
    exported = export("mistral")
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 11, 6)]
    shared = open_decoder(exported.folder, max_length=24, threads=1)
    growing = Decoder(
        open_session(exported.folder, threads=1), {"attention": "grouped", "head_dim": 16, "num_key_value_heads": 2}
    )
    results = [d.generate(prompts, max_new_tokens=12).tokens for d in (shared, growing)]
    assert results[0] == results[1]
    alone = [shared.generate([p], max_new_tokens=12).tokens[0] for p in prompts]
    assert list(results[0]) == alone


def test_the_shared_buffer_is_written_in_place(export):
    exported = export("llama")
    decoder = open_decoder(exported.folder, max_length=16, threads=1)
    decoder.run(np.array([[5, 6, 7]]))
    cache = [value.numpy() for value in decoder._cache]
    assert all(c.shape[2] == 16 and np.abs(c[:, :, :3]).min() > 0 for c in cache)
    with pytest.raises(InputError, match="do not fit"):
        decoder.run(np.full((1, 14), 3))


def test_standard_attention_on_request(export):
    exported = export("llama", attention="standard")
    found, inputs = nodes(exported)
    assert found.count("Attention") == 2 and "GroupQueryAttention" not in found and "position_ids" in inputs
    assert exported.manifest.settings["attention"] == "standard"


def test_the_reason_is_kept_where_it_cannot_be_grouped(captured, tmp_path):
    model = captured("llama")
    for block in model.blocks[1:]:  # nothing in the end, but made of more than the attention mask
        graph = block.module.graph
        for node in graph.nodes:
            if node.target is torch.ops.qexport.cached_attention.default:
                query, mask = node.args[0], node.args[5]
                batch, _, sequence, size = query.meta["spec"].shape
                with graph.inserting_before(node):
                    one = call(graph, aten.slice.Tensor, (query, 1, 0, 1), query, shape=(batch, 1, sequence, size))
                    one = call(graph, aten.slice.Tensor, (one, 3, 0, 1), query, shape=(batch, 1, sequence, 1))
                    nothing = call(graph, aten.mul.Scalar, (one, 0.0), one)
                    node.replace_input_with(mask, call(graph, aten.add.Tensor, (mask, nothing), mask))
        block.module.recompile()
    exported = exports.export(model, FLOAT, "cpu", tmp_path / "out")
    assert exported.manifest.settings["attention"] == "standard"
    assert "adds to the scores" in exported.manifest.settings["attention_reason"]


def test_unknown_attention_is_refused(model_folder, tmp_path):
    with pytest.raises(InputError, match="grouped or standard"):
        export_model(model_folder("llama"), FLOAT, out_dir=tmp_path / "out", attention="flash")
