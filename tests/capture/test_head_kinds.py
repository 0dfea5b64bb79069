"""Models keep the head that their config names, whatever they read, and are compared by what it decides."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import SuperPointForKeypointDetection

from helpers import exports
from helpers.breadth import quick
from helpers.random_decoders import LISTS
from helpers.random_modules import HEADS, head_inputs, looked_up, save_head
from helpers.runners import captured_runner, load_weights
from qexport import validate
from qexport.api.stages.capturing import capture_model
from qexport.errors import CaptureError, InputError
from qexport.models.heads import in_two_parts
from qexport.recipe.recipe import Recipe

QUICK = ("bert_pretraining", "yolos")


@pytest.mark.by_default("bert_pretraining")
@pytest.mark.parametrize("name", quick(QUICK, among=[name for name in HEADS if name != "superpoint"]))
def test_outputs_are_those_of_the_class_that_the_config_names(tmp_path, name):
    captured = capture_model(save_head(name, tmp_path))
    kind = getattr(transformers, LISTS["heads"][name]["head"])
    model = kind.from_pretrained(tmp_path, attn_implementation="eager").eval()
    run = captured_runner(load_weights(captured))
    for feeds in head_inputs(captured):
        with torch.no_grad():
            made, got = model(**feeds), run(feeds)
        mask = feeds.get("attention_mask")
        for output, value in got.items():
            want = looked_up(made, output)
            if mask is not None and value.shape[:2] == mask.shape:
                value, want = value[mask.bool()], want[mask.bool()]
            assert (value - want).abs().max() < 2e-5 * want.abs().max(), output


@pytest.mark.slow
def test_points_are_chosen_from_maps_behind_the_file(tmp_path):
    captured = capture_model(save_head("superpoint", tmp_path))
    model = SuperPointForKeypointDetection.from_pretrained(tmp_path).eval()
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made, want = captured_runner(load_weights(captured))({"pixel_values": pictures}), model(pictures)
    assert {name: list(value.shape) for name, value in made.items()} == {
        "scores": [2, 64, 64], "descriptors": [2, model.config.descriptor_decoder_dim, 8, 8]
    }  # fmt: skip
    for row, count in enumerate(want.mask.sum(1).tolist()):
        places, scores = model.keypoint_decoder._extract_keypoints(made["scores"][row : row + 1])
        sampled = model.descriptor_decoder._sample_descriptors(places[None].clone(), made["descriptors"][row][None])
        assert len(places) == count > 10
        assert torch.equal(places / 64, want.keypoints[row, :count])
        assert torch.allclose(scores, want.scores[row, :count], rtol=1e-5)
        assert torch.allclose(sampled[0].T, want.descriptors[row, :count], atol=1e-5)


def test_a_picture_classifier_goes_through_the_command_line(tmp_path, run):
    folder, pictures = save_head("vit_image", tmp_path / "model"), tmp_path / "pictures.safetensors"
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    save_file({"any": torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(3))}, pictures)
    code, stdout, stderr = run(
        "export", str(folder), "-r", "w8a8_static", "-o", str(tmp_path / "out"), "--calibration", str(pictures)
    )
    assert code == 0 and "12 rows of pictures.safetensors" in stdout and "reads pictures of 16 x 16 pixels" in stderr
    assert "tokenizer" not in stderr and (tmp_path / "out" / "preprocessor_config.json").is_file()
    asked = ("--text", str(pictures), "--windows", "10", "--json")
    code, stdout, _ = run("validate", str(tmp_path / "out"), "--reference", str(folder), *asked)
    report = json.loads(stdout)
    (logits,) = report["outputs"]
    assert code == 0 and not report["problems"] and report["reader"]["difference"] < 1e-4
    assert logits["choices"] == 10 and 0.5 < logits["same_choice"] <= 1 and 0 < logits["choice_kl"] < 0.5


@pytest.mark.slow
def test_random_numbers_have_to_be_asked_for(tmp_path):
    folder = save_head("vit_image", tmp_path / "model")
    with pytest.raises(InputError, match="the model cannot make its own input to calibrate on"):
        exports.exporting.export(folder, "w8a8_static", out_dir=tmp_path / "out")
    result = exports.exporting.export(folder, "w8a8_static", out_dir=tmp_path / "out", calibration="random")
    assert "random numbers" in result.calibration
    report = validate(result.folder, folder, windows=3)
    assert report.own_text and "3 rows of random numbers" in report.text and report.outputs[0].choices == 3


def test_pictures_of_another_size_and_files_without_any_are_refused(tmp_path):
    folder = save_head("vit_image", tmp_path / "model")
    captured, recipe = capture_model(folder), Recipe.load("w8a8_static")
    with pytest.raises(InputError, match=r"pixel_values is \[4, 3, 8, 8\], not \[n, 3, 16, 16\]"):
        exports.export(captured, recipe, "cpu", tmp_path / "out", calibration=torch.zeros(4, 3, 8, 8))
    text = tmp_path / "text.txt"
    text.write_text("a text")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        exports.exporting.export(folder, "w8a8_static", out_dir=tmp_path / "out", calibration=str(text))


@pytest.mark.slow
def test_one_of_several_texts_is_chosen(tmp_path):
    folder = save_head("bert_choice", tmp_path / "model")
    result = exports.exporting.export(folder, "w8a16", out_dir=tmp_path / "out", calibration="random")
    report = validate(result.folder, folder, windows=6)
    assert report.outputs[0].choices == 3 and report.outputs[0].same_choice == 1 and not report.problems


def test_a_detector_has_a_decoder_and_is_one_file(tmp_path):
    config = transformers.AutoConfig.for_model("detr", architectures=["DetrForObjectDetection"])
    assert config.is_encoder_decoder and not in_two_parts(config)
    assert in_two_parts(transformers.AutoConfig.for_model("bart", architectures=["BartForConditionalGeneration"]))


def test_what_reads_other_things_is_refused(tmp_path):
    folder = save_head("vit_image", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["ViTForPictureBooks"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CaptureError, match="names ViTForPictureBooks, which is neither"):
        capture_model(folder)


def test_pictures_and_text_of_an_unknown_kind_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "janus", "architectures": ["JanusForConditionalGeneration"]})
    )
    with pytest.raises(CaptureError, match="janus reads pictures or sound beside text, and is of no kind"):
        capture_model(tmp_path)


def test_words_on_a_page_are_refused_without_their_places(tmp_path):
    config = transformers.LayoutLMConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    transformers.LayoutLMModel(config).save_pretrained(tmp_path)
    with pytest.raises(CaptureError, match=r"reads where words stand on a page \(bbox\)"):
        capture_model(tmp_path)


@pytest.mark.slow
def test_pictures_are_compared_with_texts_in_one_file(tmp_path):
    folder, pairs = save_head("clip", tmp_path / "model"), tmp_path / "pairs.safetensors"
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (6, 8), generator=random)
    save_file(
        {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(6, 3, 16, 16, generator=random),
        },
        pairs,
    )  # fmt: skip
    result = exports.exporting.export(folder, "w8a8_dyn", out_dir=tmp_path / "out", calibration=str(pairs))
    report = validate(result.folder, folder, text=str(pairs), windows=6)
    logits = next(output for output in report.outputs if output.name == "logits_per_image")
    assert "6 rows of pairs.safetensors" in report.text and not report.problems
    assert logits.rank_correlation > 0.9  # of pairs, which are read one by one
