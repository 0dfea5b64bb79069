"""What depends on the length of a text: rotary frequencies, and attention in chunks; behind the border too."""

import pytest
import torch

from helpers import exports
from helpers.breadth import quick
from helpers.random_decoders import reference_model, save_model
from helpers.runners import tokens
from qexport.api.stages.capturing import capture_model
from qexport.graph.ops.attention import MASKED
from qexport.models.steps import Steps
from qexport.recipe.recipe import Override, Recipe
from qexport.runtime.decoder import open_decoder

FLOAT = {"scheme": "w8a8_dyn", "overrides": (Override(match="*", scheme="float"),)}
# Families, and tokens in front of the border and behind it.
BORDERS = {"long_longrope": (32, 40), "dynamic_rope": (128, 140), "llama4": (8, 21)}


def test_a_chunk_begins_behind_the_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1, 1, 1]])
    got = torch.ops.qexport.causal_mask(mask, 2, 0, 3)
    assert got.shape == (2, 1, 7, 9)
    for row, real in enumerate(mask):
        lead = int(real.argmax())
        for query in range(2, 9):
            for key in range(9):
                seen = real[key] and key <= query and (key - lead) // 3 == (query - lead) // 3
                if query >= lead:
                    assert got[row, 0, query - 2, key] == (0.0 if seen else MASKED)


@pytest.mark.parametrize("family", quick(["long_longrope"], among=BORDERS))
def test_texts_around_the_border_are_transformers(tmp_path, family):
    """Prompts that end in front of it, at it and behind it, and one that is written over it."""
    folder = save_model(family, tmp_path / "model")
    exported = exports.export(capture_model(folder), Recipe(**FLOAT), "cpu", tmp_path / "out")
    short, long = BORDERS[family]
    decoder, ids = open_decoder(exported.folder), tokens(1, long)
    for length in (short - 3, short, short + 1, long):
        with torch.no_grad():  # a model that has read nothing: transformers keeps the frequencies of longer texts
            want = reference_model(folder)(ids[:, :length]).logits
        decoder.reset()
        got = torch.from_numpy(decoder.run(ids[:, :length].numpy()).copy())
        assert (got - want[:, -got.shape[1] :]).abs().max() < 1e-5 * want.abs().max()
    # Written over the border: keys that are cached stay as they are, in transformers too.
    steps, start = Steps(reference_model(folder)), 0
    decoder.reset()
    for end in (short - 1, short, short + 1, short + 2):
        mask, places = torch.ones(1, end, dtype=torch.int64), torch.arange(start, end)[None]
        want = steps(input_ids=ids[:, start:end], attention_mask=mask, position_ids=places).logits
        got = torch.from_numpy(decoder.run(ids[:, start:end].numpy()).copy())
        assert (got - want[:, -got.shape[1] :]).abs().max() < 1e-5 * want.abs().max()
        start = end


def test_a_dynamic_base_is_for_longer_texts_than_the_positions(model_folder):
    assert capture_model(model_folder("long_longrope")).settings["max_position_embeddings"] == 128
    assert capture_model(model_folder("dynamic_rope")).settings["max_position_embeddings"] == 4 * 128
