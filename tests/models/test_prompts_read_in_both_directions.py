"""PaliGemma: a prompt sees all of itself, what is written is causal, and files write what transformers writes."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.random_pictures import picture_file, picture_tokenizer, save_pictures_model
from qexport import export, generate, validate
from qexport.models.vision_language.kinds.paligemma import PaliGemma, prefix_pairs
from qexport.recipe.recipe import Recipe


@given(st.integers(0, 3), st.lists(st.integers(0, 2), min_size=1, max_size=3), st.integers(1, 5), st.data())
@settings(max_examples=30, deadline=None)
def test_pairs_of_the_prefix_are_those_counted_one_by_one(past, padded, new, data):
    rows = len(padded)
    written = data.draw(st.lists(st.integers(0, new), min_size=rows, max_size=rows))
    types = torch.stack([(torch.arange(new) >= begin).long() for begin in written])
    mask = torch.stack([(torch.arange(past + new) >= lead).long() for lead in padded])
    seen = prefix_pairs(types, mask)
    assert seen.shape == (rows, 1, new, past + new)
    for row in range(rows):
        for query in range(new):
            for key in range(past + new):
                both = key >= past and types[row, query] == 0 and types[row, key - past] == 0
                assert bool(seen[row, 0, query, key]) == bool(both and mask[row, key])


@pytest.mark.parametrize(
    "text, prompt, answer",
    [
        ("<image>what\na cat", "<image>what", "a cat"), ("<image>a cat", "<image>", "a cat"),
        ("<image>a\nb\nc", "<image>a", "b\nc"),
    ],  # fmt: skip
)
def test_the_first_line_of_a_text_is_the_prompt(text, prompt, answer):
    assert PaliGemma().texts(text, "<image>") == {"text": [prompt], "suffix": [answer]}


def save_processor(folder):
    from transformers import PaliGemmaProcessor, SiglipImageProcessorPil

    pictures = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    pictures.image_seq_length = 16
    PaliGemmaProcessor(image_processor=pictures, tokenizer=picture_tokenizer()).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["paligemma", "paligemma2"])
def test_files_write_what_transformers_writes(kind, tmp_path):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = save_pictures_model(kind, tmp_path / "model", processor=False)
    save_processor(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    processor, picture = AutoProcessor.from_pretrained(folder), picture_file(tmp_path)
    made = processor(text=["<image>what is it"], images=[[Image.open(picture)]], return_tensors="pt")
    made.pop("labels")
    with torch.no_grad():
        ids = model.eval().generate(**made, max_new_tokens=8, do_sample=False, suppress_tokens=[127])
    want = processor.tokenizer.decode(ids[0, made["input_ids"].shape[1] :], skip_special_tokens=True)
    export(folder, Recipe(scheme="float"), out_dir=tmp_path / "out")
    assert generate(tmp_path / "out", "what is it", images=[picture], max_new_tokens=8) == [want]
    alone = [generate(tmp_path / "out", text, max_new_tokens=4)[0] for text in ("no", "no picture")]
    assert generate(tmp_path / "out", ["no", "no picture"], max_new_tokens=4) == alone  # padding is no prompt

    pairs = tmp_path / "pairs.jsonl"
    lines = [{"image": picture.name, "text": f"what\na thing {'!' * n}"} for n in range(3)]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    report = validate(tmp_path / "out", folder, text=str(pairs), windows=3, greedy=4)
    assert report.logits.tokens == 3 * len("a thing ") + 3  # of each text what is written, with what ends it
    assert report.logits.kl_mean < 1e-8 and report.greedy.agreed == (4, 4, 4)
