"""onnxruntime-genai reads a picture with what `export` writes, and writes the same text about it as our own loop."""

import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from helpers.random_pictures import picture_file, picture_tokenizer, save_pictures_model
from qexport import export
from qexport.artifact.files import read_json
from qexport.errors import InputError
from qexport.recipe.recipe import Recipe
from qexport.runtime.genai_pictures import pictures_processor
from qexport.runtime.vision_language import open_vision_language

NEW = 6
PROMPT = "<|vision_start|><|image_pad|><|vision_end|>what is it"
SPECIAL = ("<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
PICTURES = {
    "size": {"shortest_edge": 256, "longest_edge": 1024}, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2
}  # fmt: skip


def save_model(kind, folder):
    save_pictures_model(kind, folder, processor=False)
    picture_tokenizer(SPECIAL).save_pretrained(folder)
    Qwen2VLImageProcessorPil(**PICTURES).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("scheme", ["float", "w4a16_g32"])
def test_same_greedy_tokens_about_a_picture(kind, scheme, tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    folder = export(save_model(kind, tmp_path / "model"), Recipe(scheme=scheme), out_dir=tmp_path / "out").folder
    picture, model = picture_file(tmp_path), og.Model(str(folder))
    inputs = model.create_multimodal_processor()(PROMPT, images=og.Images.open(str(picture)))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=60, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.set_inputs(inputs)
    prompt = [int(token) for token in generator.get_sequence(0)]
    for _ in range(NEW):
        if not generator.is_done():
            generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    pixels = Qwen2VLImageProcessorPil(**PICTURES)(images=[Image.open(picture)], return_tensors="np")
    assert abs(pixels["pixel_values"] - inputs["pixel_values"].as_numpy()).max() < 1e-5
    reader, decoder = open_vision_language(folder, threads=1, max_length=60)
    reader.read(dict(pixels))
    (expected,) = decoder.generate([prompt], max_new_tokens=NEW).tokens
    assert tuple(found) == expected[: len(found)] and len(found) >= 1


def test_a_processor_in_words_of_genai():
    config = {**PICTURES, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    steps = [step["operation"] for step in pictures_processor(config)["processor"]["transforms"]]
    assert [step["type"] for step in steps] == [
        "DecodeImage", "ConvertRGB", "Resize", "Rescale", "Normalize", "PatchImage"
    ]  # fmt: skip
    assert steps[2]["attrs"]["min_pixels"] == 256 and steps[2]["attrs"]["max_pixels"] == 1024
    assert steps[5]["attrs"] == {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    with pytest.raises(InputError, match="says no image_mean"):
        pictures_processor(PICTURES)


@pytest.mark.slow
def test_a_folder_without_a_processor_of_pictures_has_no_config(tmp_path, caplog):
    folder = save_pictures_model("qwen2_5_vl", tmp_path / "model", processor=False)
    out = export(folder, "w4a16_g32_rtn", out_dir=tmp_path / "out").folder
    assert not (out / "genai_config.json").exists() and "genai_config.json is left out" in caplog.text
    assert read_json(out / "manifest.json")["grid"] == "image_grid_thw"
