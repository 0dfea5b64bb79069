"""What transformers works out from values one by one, as a graph for any text: blocks of tokens, hashes of ids."""

import pytest
import torch
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen

from helpers import agreement
from helpers.random_decoders import LISTS, randomize, reference_model, save_model
from helpers.runners import captured_runner, load_weights, next_feeds, padded, prompt_feeds, transformers_runner
from qexport.api.stages.capturing import capture_model
from qexport.capture import indexed_blocks, ngrams  # noqa: F401  declare what takes the place of modules
from qexport.capture.attention import GraphCache
from qexport.capture.kept import INDEXER, KEY, VALUE, state
from qexport.capture.recurrences import recurrences_as_nodes
from qexport.graph.ops.attention import MASKED

TOKENS, HALF, END = 11, 8, 2


class Model(torch.nn.Module):
    """A module of the model, as what draws weights takes models."""

    def __init__(self, kind, *sizes, **changes):
        super().__init__()
        given = {key: value for key, value in LISTS["breadth"]["qwen4_exp"].items() if key != "model_type"} | changes
        self.module = kind(qwen.Qwen4ExpTextConfig(**given), *sizes)
        self.table = torch.nn.Embedding(2, 2)
        randomize(self, seed=0)

    def get_input_embeddings(self):
        return self.table


@pytest.mark.parametrize("side", ["left", "right"])
def test_blocks_are_those_of_each_query(side):
    indexer = Model(qwen.Qwen4ExpTextQSAIndexer, 0).module
    draw, real = torch.Generator().manual_seed(1), padded([TOKENS, 4, 1], side).bool()
    hidden, angles = torch.randn(3, TOKENS, 64, generator=draw), torch.randn(3, TOKENS, HALF, generator=draw)
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & real[:, None]
    want = indexer(hidden, (cos, sin), torch.where(causal, 0.0, -1e9)[:, None], None)
    assert (causal[0] & ~want[0, 0]).any()  # it does leave some out
    past = {KEY: torch.zeros(3, 1, 0, 4), VALUE: torch.zeros(3, 1, 0, 4), INDEXER: torch.zeros(3, 1, 0, 16 + 2 * HALF)}
    for part in torch.arange(TOKENS).split([5, 1, 5]):
        cache, end = GraphCache([past]), int(part[-1]) + 1
        mask = torch.where(causal[:, part, :end], 0.0, MASKED)[:, None]
        with recurrences_as_nodes(indexer), torch.no_grad():
            got = indexer(hidden[:, part], (cos[:, part], sin[:, part]), mask, cache)
        past |= cache.attended[0].rows
        shown = causal[:, None, part, :end] & real[:, None, part, None]  # what queries of padding read is nothing's
        assert torch.equal(got & shown, want[:, :, part, :end] & shown)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ids_of_any_size_are_kept_in_floats_of_any_type(dtype):
    embedding = Model(qwen.Qwen4ExpTextNGramEmbedding, 16, 0, vocab_size=70_000).module
    ids = torch.randint(0, 70_000, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    ids[0, 4], ids[1, 7:9], ids[0, -1] = END, END, 69_999
    with torch.no_grad():
        want, state_of_ids = embedding(ids, None), torch.zeros(2, 3, 2)
        for part in torch.arange(TOKENS).split([1, 1, 5, 1, 3]):
            cache = GraphCache([{state("conv", 2): state_of_ids}])
            with recurrences_as_nodes(embedding):
                got = embedding(ids[:, part], cache)
            assert torch.equal(got, want[:, part])
            state_of_ids = cache.present()[0].to(dtype).float()


@pytest.mark.slow
def test_texts_that_end_in_the_middle(tmp_path):
    folder = save_model("qwen4_exp", tmp_path / "model")
    captured, mask = load_weights(capture_model(folder)), padded([9, 4, 6], "left")
    ids = torch.randint(3, 128, mask.shape, generator=torch.Generator().manual_seed(0))
    ids[0, 3], ids[2, -1] = END, END
    ours, theirs = captured_runner(captured), transformers_runner(reference_model(folder))
    feeds = prompt_feeds(captured, ids, mask)
    for step in range(1 + agreement.STEPS):
        got, want = ours(feeds), theirs(feeds)["logits"]
        real = feeds["attention_mask"][:, -want.shape[1] :].bool()
        assert (got["logits"] - want)[real].abs().max() < 1e-5 * want[real].abs().max()
        feeds = next_feeds(feeds, got, torch.tensor([END if step == 2 else 5 + step, 7, 9]))
