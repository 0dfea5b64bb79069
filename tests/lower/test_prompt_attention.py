"""Attention over floats for many tokens at once, in front of a cache of codes: the same numbers, and the same codes."""

import numpy as np
import onnx
import pytest
import torch

from helpers import exports
from helpers.agreement import ROUNDING
from helpers.breadth import quick
from helpers.runners import prompt_feeds, tokens
from lower.test_kv_cache import MASK, empty_caches, recipe_of, steps
from qexport.api.exporting import export as export_model
from qexport.lower import prompt_attention
from qexport.quant.kv_cache import unpack_cache
from qexport.runtime.decoder import open_decoder


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(prompt_attention, "MANY", 4)


@pytest.mark.parametrize("bits, scales", [(8, "channel"), (8, "tensor"), (4, "channel")])
# Rotated inside of attention, in part before it, sinks, a window, scores with a cap.
@pytest.mark.parametrize(
    "family", quick(["llama"], among=["llama", "gpt_neox", "gpt_oss", "gemma3", "gemma2"])
)
@pytest.mark.each_value_once
def test_a_prompt_and_steps_are_what_the_graph_says(captured, tmp_path, many, family, bits, scales):
    exported = exports.export(captured(family), recipe_of(bits, scales), "cpu", tmp_path / "out")
    feeds = empty_caches(prompt_feeds(exported.captured, tokens(*MASK.shape), MASK), exported.lowered.inputs)
    lowered = exported.lowered
    graph = exports.block_runner(exported.blocks, lowered.inputs, lowered.outputs)
    ran, wanted = steps(exported.in_onnxruntime(), feeds), steps(graph, feeds)
    different = (ran - wanted).abs().amax(-1) / wanted.abs().max()
    # As in test_kv_cache.py.
    assert (different > ROUNDING).float().mean() <= 0.15 and different.max() < 2e-3
    nodes = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "If" for node in nodes) == len(exported.captured.blocks) - 2


@pytest.mark.parametrize(
    "bits, fields", [(8, {}), (8, {"prefill": "int8", "scheme": "w4a16_g32", "overrides": ()}), (4, {})]
)
def test_pieces_of_a_prompt_leave_the_codes_that_the_other_kernel_leaves(
    model_folder, tmp_path, monkeypatch, bits, fields
):
    found = []
    for many in (4, 1 << 20):
        monkeypatch.setattr(prompt_attention, "MANY", many)
        recipe = recipe_of(bits).model_copy(update=fields)
        folder = export_model(model_folder("llama"), recipe, out_dir=tmp_path / str(many)).folder
        decoder = open_decoder(folder, max_length=24, threads=1)
        text, logits = tokens(1, 15).numpy(), []
        for start, stop in ((0, 6), (6, 7), (7, 13), (13, 15)):
            logits.append(decoder.run(text[:, start:stop]))
        found.append((np.concatenate([part.reshape(-1, part.shape[-1])[-1:] for part in logits]), [
            unpack_cache(torch.tensor(cache.numpy()[:, :, :15]), bits).int().numpy() for cache in decoder._cache
        ]))  # fmt: skip
    (ours, codes), (theirs, wanted) = found
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()
    assert all(np.abs(a - b).max() <= 1 and (a != b).mean() < 0.01 for a, b in zip(codes, wanted, strict=True))
    assert any((cache != 0).any() for cache in codes)


def test_a_cache_on_cuda_has_no_branches(captured, tmp_path):
    exported = exports.export(captured("llama"), recipe_of(8), "cuda", tmp_path / "out")
    nodes = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph.node
    assert not any(node.op_type == "If" for node in nodes)
