"""Where greedy texts part, against texts that both models write step by step."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.runners import tokens
from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.artifact import manifest as manifests
from qexport.recipe.recipe import Override, Recipe
from qexport.runtime.decoder import open_decoder
from qexport.validation.greedy import alike, compare_greedy

WINDOWS, NEW = tokens(6, 80), 24


@pytest.fixture(scope="module")
def llama(model_folder):
    return model_folder("llama")


@pytest.fixture(scope="module")
def exported(llama, export_folder):
    """Arguments of `compare_greedy` for an export in 4 bits."""
    folder = export_folder("llama", Recipe(scheme="w4a16_g32"))
    return capture_model(llama), manifests.load(folder), folder


def test_texts_part_where_two_texts_written_apart_do(llama, exported):
    captured, manifest, folder = exported
    found = compare_greedy(captured, manifest, folder, WINDOWS, NEW, threads=1)
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    decoder, expected = open_decoder(folder, manifest, threads=1, max_length=64 + NEW), []
    for ids in WINDOWS[:4, :64]:
        text = ids[None]
        with torch.no_grad():
            for _ in range(NEW):
                text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
        written = decoder.generate([ids.tolist()], max_new_tokens=NEW).tokens[0]
        pairs = zip(text[0, 64:].tolist(), written, strict=True)
        expected.append(next((i for i, (a, b) in enumerate(pairs) if a != b), NEW))
    assert found.agreed == tuple(expected) and (found.prompts, found.prompt_tokens, found.new_tokens) == (4, 64, NEW)
    assert min(expected) < NEW, "nothing parts, so nothing is tested"


def test_a_float_file_never_parts(llama, tmp_path):
    export(
        llama, Recipe(scheme="w4a16_g32", overrides=(Override(match="*", scheme="float"),)), out_dir=tmp_path / "out"
    )
    given = capture_model(llama), manifests.load(tmp_path / "out"), tmp_path / "out"
    assert compare_greedy(*given, WINDOWS, NEW, threads=1).agreed == (NEW,) * 4


def test_prompts_shrink_to_what_there_is_room_for(exported):
    assert compare_greedy(*exported, WINDOWS[:1, :10], 1, threads=1).prompt_tokens == 10
    found = compare_greedy(*exported, WINDOWS[:2], 100, threads=1)  # of 128 tokens that the model reads
    assert (found.prompts, found.prompt_tokens) == (2, 28)
    found = compare_greedy(*exported, WINDOWS[:1], 500, threads=1)
    assert (found.prompt_tokens, found.new_tokens) == (1, 127)


def test_alike():
    text = torch.tensor([3, 1, 2])
    assert [alike(text, torch.tensor(other)) for other in ([3, 1, 2], [3, 0, 2], [0, 1, 2])] == [3, 1, 0]
