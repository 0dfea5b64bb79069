"""onnxruntime-genai loads what `export` writes, as it is, and writes the same greedy text as our own loop."""

import numpy as np
import pytest

from helpers.tokenizer_files import write_word_tokenizer
from qexport.api.exporting import export
from qexport.recipe.recipe import Recipe
from qexport.runtime.decoder import open_decoder

NEW = 10
PROMPT = [5, 6, 7, 11, 3]


def greedy_in_genai(folder):
    og = pytest.importorskip("onnxruntime_genai")
    write_word_tokenizer(folder)
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + NEW, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    return tuple(map(int, generator.get_sequence(0)[len(PROMPT) :]))


def assert_same(folder):
    expected = open_decoder(folder, threads=1).generate([PROMPT], max_new_tokens=NEW).tokens[0]
    found = greedy_in_genai(folder)
    assert found == tuple(expected)[: len(found)] and len(found) >= 1


@pytest.mark.by_default("llama-*")
@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", "w4a16_g32_rtn"), pytest.param("llama", "w8a8_dyn", marks=pytest.mark.slow),
        pytest.param("qwen2", "w4a8_g128", marks=pytest.mark.slow), ("mistral", "w8a8_static"),
    ],  # fmt: skip
)
def test_same_greedy_tokens(model_folder, tmp_path, family, recipe):
    assert_same(export(model_folder(family), recipe, out_dir=tmp_path / "out", calibration="random").folder)


@pytest.mark.by_default("last")
@pytest.mark.parametrize("logits", ["all", "last"])
def test_same_greedy_tokens_with_a_tied_embedding(model_folder, tmp_path, logits):
    recipe = Recipe(scheme="w4a16_g32", lm_head="w8a16_g32", embedding="tied")
    assert_same(export(model_folder("llama_bias"), recipe, out_dir=tmp_path / "out", logits=logits).folder)


def test_requests_of_different_lengths_share_a_batch_of_the_engine(model_folder, tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    folder = export(model_folder("llama"), "w4a16_g32_rtn", out_dir=tmp_path / "out").folder
    write_word_tokenizer(folder)
    prompts = [[5, 6, 7, 11, 3], [9, 4], [12, 30, 8, 7, 6, 5, 4, 3]]
    engine, found = og.Engine(og.Model(str(folder))), []
    for prompt in prompts:
        request = engine.create_request()
        turn = og.TurnOptions(request)
        turn.set_max_generated_tokens(NEW)
        turn.set_do_sample(False)
        request.begin_turn(np.array(prompt, np.int32), turn)
        found.append((request, list[int]()))
    events = engine.create_event_buffer(16)
    for _ in range(4 * NEW):
        for event in engine.run(events) if engine.has_pending_requests() else ():
            next(tokens for request, tokens in found if request == event.request).append(event.token)
    decoder = open_decoder(folder, threads=1)
    for prompt, (_, tokens) in zip(prompts, found, strict=True):
        alone = decoder.generate([prompt], max_new_tokens=NEW, eos_token_ids=[2]).tokens[0]
        assert tuple(tokens[: len(alone)]) == alone
