"""Summaries of tokens that attention reads beside single ones: what transformers' modules make of the same."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek

from helpers import agreement
from helpers.random_decoders import LISTS, randomize, reference_model, save_model
from helpers.runners import captured_runner, load_weights, transformers_runner
from qexport.api.stages.capturing import capture_model
from qexport.capture import summaries
from qexport.capture.attention import GraphCache
from qexport.capture.kept import INDEXER, KEY, SUMMED
from qexport.capture.recurrences import recurrences_as_nodes
from qexport.errors import CaptureError

TOKENS, WIDTHS = 11, {"DeepseekV4HCACompressor": (3, 32, 0), "DeepseekV4CSACompressor": (2, 64, 64)}


class Model(torch.nn.Module):
    """A compressor, as what draws weights takes models."""

    def __init__(self, name):
        super().__init__()
        given = {key: value for key, value in LISTS["breadth"]["deepseek_v4"].items() if key != "model_type"}
        self.compressor = getattr(deepseek, name)(deepseek.DeepseekV4Config(**given))
        self.table = torch.nn.Embedding(2, 2)
        randomize(self, seed=0)

    def get_input_embeddings(self):
        return self.table


def empty(summed, indexed):
    rows = {KEY: torch.zeros(2, 1, 0, 4), SUMMED: torch.zeros(2, 1, 0, summed)}
    return rows | ({INDEXER: torch.zeros(2, 1, 0, indexed)} if indexed else {})


@pytest.mark.parametrize("name", WIDTHS)
def test_entries_and_what_reads_them_are_transformers(name):
    compressor, (rate, summed, indexed) = Model(name).compressor, WIDTHS[name]
    draw = torch.Generator().manual_seed(1)
    hidden, query = torch.randn(2, TOKENS, 64, generator=draw), torch.randn(2, TOKENS, 16, generator=draw)
    positions = torch.arange(TOKENS).expand(2, -1)
    with torch.no_grad():
        want, bias = compressor(hidden, query, positions, None, 0)
        past, masks = empty(summed, indexed), []
        for part in torch.arange(TOKENS).split([1, 4, 6]):  # one with no full window among them
            with recurrences_as_nodes(compressor):
                cache = GraphCache([past])
                entries, mask = compressor(hidden[:, part], query[:, part], positions[:, part], cache, 0)
            rows = cache.attended[0].rows
            past |= rows
            full = TOKENS // rate
            masks.append(torch.nn.functional.pad(mask, (0, full + 2 - mask.shape[-1]), value=-1.0)[..., :full])
    assert past[SUMMED].shape == (2, 1, TOKENS, summed)
    assert want.shape[2] == full and torch.allclose(entries[:, :, :full], want, atol=1e-5)
    assert torch.equal(torch.cat(masks, 2) == 0, bias == 0)


def test_windows_wider_than_the_example_of_a_trace():
    class Windows(torch.nn.Module):
        def forward(self, rows):
            return summaries.windows(rows, 16)

    dynamic = ({1: torch.export.Dim.DYNAMIC},)
    traced = torch.export.export(Windows(), (torch.zeros(2, 8, 3),), dynamic_shapes=dynamic, strict=False).module()
    rows = torch.randn(2, 40, 3)
    got = traced(rows)
    assert torch.equal(got.flatten(1, 2)[:, :40], rows) and got.shape == (2, 4, 16, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [("deepseek_v4", {"layer_types": ["heavily_compressed_attention"], "mlp_layer_types": ["moe"],
                      "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 11}}),
     ("qwen4_exp", {"layer_types": ["indexed_attention"], "ple_layer_ids": [], "indexer_compress_ratio": 10,
                    "indexer_budget": 10})],
)  # fmt: skip
def test_a_text_of_many_windows_by_a_graph_of_none_that_is_full(tmp_path, family, changes):
    folder = save_model(family, tmp_path / "model", num_hidden_layers=1, **changes)
    captured, mask = capture_model(folder), torch.ones(2, 35, dtype=torch.int64)
    runs = captured_runner(load_weights(captured)), transformers_runner(reference_model(folder))
    got, want = agreement.logits(mask, *((run, captured, torch.float32) for run in runs))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.slow
def test_experts_by_token_are_those_of_the_checkpoint(tmp_path):
    kinds = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "mlp_layer_types": ["hash_moe"]}
    folder = save_model("deepseek_v4", tmp_path / "model", **kinds)
    captured, mask = capture_model(folder), torch.ones(2, 9, dtype=torch.int64)
    runs = captured_runner(load_weights(captured)), transformers_runner(reference_model(folder))
    got, want = agreement.logits(mask, *((run, captured, torch.float32) for run in runs))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    weights, name = load_file(folder / "model.safetensors"), "model.layers.0.ffn.gate.tid2eid"
    save_file(weights | {name: weights[name].roll(1, 0)}, folder / "model.safetensors", {"format": "pt"})
    other = captured_runner(load_weights(capture_model(folder)))
    assert (agreement.logits(mask, (other, captured, torch.float32))[0] - want).abs().max() > 0.01 * want.abs().max()
    save_file(weights | {name: weights[name][:5]}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CaptureError, match=r"is torch.int64 \[5, 2\] in the checkpoint"):
        capture_model(folder)
