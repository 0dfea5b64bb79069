"""Models of pictures and text: all files compute what their graphs and transformers compute, alone and in a chain."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers import exports
from helpers.breadth import quick
from helpers.random_pictures import KINDS, QUICK, picture_file, save_pictures_model
from qexport import Chat, Drafts, bench, export, generate, inspect, validate
from qexport.api.vision_language.sources import calibration_data, decoder_feeds, float_feeds, load_examples
from qexport.artifact import manifest as manifests
from qexport.artifact.cache_names import is_past, present_of
from qexport.artifact.manifest import DECODER, EMBEDDING, VISION
from qexport.calibrate import loop
from qexport.capture import streamed
from qexport.capture.vision_language import capture_vision_language
from qexport.errors import InputError, RuntimeProblem
from qexport.models.source import open_model
from qexport.models.vision_language import vision_language_of
from qexport.models.vision_language.prompts import random_prompt
from qexport.progress import no_stage_progress
from qexport.quant.metrics import sqnr_db
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.runtime.bench_process import _Subject
from qexport.runtime.vision_language import open_vision_language
from qexport.validation.placement import examine
from qexport.validation.reader import check_reader

FAMILIES = quick(QUICK, among=KINDS)
KERNELS = {"w4a16_g32": "MatMulNBits", "w8a8_dyn": "MatMulIntegerToFloat", "w8a8_static": "MatMulIntegerToFloat"}


def spec(source="random", samples=3):
    return CalibrationSpec(source=source, samples=samples, sequence_length=12, batch_size=2)


def recipe_of(scheme, **fields):
    return Recipe(scheme=scheme, accuracy_level=1, calibration=spec(), **fields)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    return save_pictures_model(request.param, tmp_path_factory.mktemp(request.param), processor=False)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_pictures_model("llava", tmp_path_factory.mktemp("model") / "llava")


@pytest.fixture(scope="module")
def float_files(llava, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "float"
    export(llava, Recipe(scheme="float"), out_dir=out)
    return out


def eager(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.mark.slow  # as every export does it
@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_parts_compute_what_transformers_computes(folder):
    parts = capture_vision_language(open_model(folder))
    # Of random weights: what transformers computes in float32 is 2e-4 away from what it does in float64.
    close = 1e-3 if folder.name.startswith("gemma40") else 1e-4
    for captured in parts.by_name.values():
        assert check_reader(captured).difference < close


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["llava", "gemma3"], indirect=True)
def test_weights_of_a_large_model_stay_in_its_checkpoint(folder, monkeypatch):
    monkeypatch.setattr(streamed, "LARGE", 0)
    parts = capture_vision_language(open_model(folder))
    whole = folder.name.startswith("gemma3")  # whose projector computes with a weight alone
    assert (parts.model is not None) == whole
    assert all(check_reader(captured).difference < 1e-4 for captured in parts.by_name.values())


@pytest.mark.each_value_once
@pytest.mark.parametrize("scheme", KERNELS)
@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_files_agree_with_their_graphs(folder, scheme, tmp_path):
    parts = capture_vision_language(open_model(folder))
    recipe = recipe_of(scheme)
    examples = load_examples(parts, recipe.calibration, None, no_stage_progress)
    read = calibration_data(parts, examples, no_stage_progress)
    for name, captured in parts.by_name.items():
        made = exports.export(captured, recipe, "cpu", tmp_path / name, calibration=read[name])
        placed, _ = examine(tmp_path / name, made.manifest, manifests.CPU)
        assert not placed.unfused and set(placed.nodes_per_provider) == {manifests.CPU}
        assert {entry.kernel for entry in made.manifest.linears} <= {KERNELS[scheme], "QMoE"}  # of experts
        file, graph, feeds = made.in_onnxruntime(), made.in_pytorch(), dict(read[name].batches[0])
        for _ in range(3 if name == DECODER else 1):
            got, want = file(feeds), graph(feeds)
            for output, ours in want.items():
                if scheme == "w4a16_g32":
                    assert (ours - got[output]).abs().max() < 3e-5 * ours.abs().max()
                else:  # a code here and there falls on the other side
                    assert sqnr_db(ours, got[output]) > 25
            if name == DECODER:  # a step, on what the file itself had in its cache
                feeds = step(parts, feeds, got)


def step(parts, feeds, made):
    """The inputs of a decoder for one more token of text."""
    rows, total = feeds["attention_mask"].shape
    past = {port.name: made[present_of(port.name)] for port in parts.decoder.inputs if is_past(port.name)}
    return feeds | past | {
        "inputs_embeds": feeds["inputs_embeds"][:, -1:],
        "attention_mask": torch.ones(rows, total + 1, dtype=torch.int64),
        "position_ids": feeds["position_ids"][..., -1:] + 1,
        **{name: feeds[name][:, -1:] * 0 for name in parts.kind.others(parts.config)},
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_the_chain_of_files_computes_what_transformers_computes(folder, tmp_path):
    export(folder, Recipe(scheme="float"), out_dir=tmp_path / "out")
    model, kind = eager(folder), vision_language_of(open_model(folder).config)
    prompt = random_prompt(kind, model, 2, 9)
    reader, decoder = open_vision_language(tmp_path / "out", max_length=64)
    for ids, pictures in (
        (prompt.input_ids, prompt.pictures),
        (prompt.input_ids.reshape(1, -1), prompt.pictures),  # two pictures in one text
        (prompt.input_ids[:, -5:], {}),
    ):
        decoder.reset()
        reader.read({n: t.numpy() for n, t in pictures.items()}) if pictures else reader.forget()
        beside = {**kind.given(pictures, len(ids)), **kind.beside(model.config, ids)} if pictures else {}
        parts = [ids[:, :-3], ids[:, -3:-1], ids[:, -1:]] if len(ids) == 1 else [ids[:, :-1], ids[:, -1:]]
        behind = torch.arange(ids.shape[1]).expand_as(ids) >= parts[0].shape[1]  # a prompt is what the first call reads
        with torch.no_grad():
            want = model(input_ids=ids, **{**beside, **kind.told(model.config, behind)}).logits
        got = torch.cat([torch.tensor(decoder.run(part.numpy())) for part in parts], dim=1)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_encoders_read_frames_of_films_as_transformers_does(folder):
    model = eager(folder)
    kind, grid = vision_language_of(model.config), torch.tensor([[3, 4, 6], [2, 6, 4]])
    numbers = kind.inputs(model.config)["pixel_values"].dims[1]
    patches = torch.randn(int(grid.prod(1).sum()), numbers, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = kind.features(model, {"pixel_values": patches, "image_grid_thw": grid})
        want = torch.cat(list(model.model.get_video_features(patches, grid).pooler_output))
    assert (got[:, : want.shape[1]] - want).abs().max() < 1e-5 * want.abs().max()  # behind them those of first layers


def test_text_about_a_picture_is_that_of_transformers(llava, float_files, tmp_path):
    model, processor, picture = eager(llava), AutoProcessor.from_pretrained(llava), picture_file(tmp_path)
    from PIL import Image

    made = processor(text=["<image>what is it"], images=[[Image.open(picture)]], return_tensors="pt")
    with torch.no_grad():
        want = model.generate(**made, max_new_tokens=6, do_sample=False)[0, made["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(want, skip_special_tokens=True)
    assert generate(float_files, "what is it", images=[picture], max_new_tokens=6) == [text]
    assert generate(float_files, "<image>what is it", images=[Image.open(picture)], max_new_tokens=6) == [text]
    assert generate(float_files, "what is it", images=[picture], chat=True, max_new_tokens=6)[0]
    assert generate(float_files, ["no picture", "nor here"], max_new_tokens=3)


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(prompt="<image><image>", images=["P"]), "2 places for pictures, but 1"),
        (dict(prompt=["a", "b"], images=["P"]), "belong to one prompt"),
        (dict(prompt="a", images=["nowhere.png"]), "cannot be read as a picture"),
        (dict(prompt="a", adapter="x"), "cannot keep adapters apart"),
        (dict(prompt="<image>"), "but the encoder made 0 rows"),
    ],
)
def test_what_generate_does_not_take(float_files, tmp_path, given, said):
    picture = picture_file(tmp_path)
    given = {**given, "images": [picture if image == "P" else image for image in given.get("images", ())]}
    with pytest.raises(InputError, match=said):
        generate(float_files, **given)


def test_a_decoder_alone_is_refused(float_files):
    with pytest.raises(InputError, match="another part of the model makes"):
        generate(float_files / DECODER, "a")
    with pytest.raises(InputError, match="three exports"):
        manifests.load(float_files)


def test_a_folder_without_a_processor_says_so(float_files, tmp_path):
    bare = shutil.copytree(float_files, tmp_path / "bare")
    (bare / "processor_config.json").unlink()
    with pytest.raises(InputError, match="processor of pictures"):
        generate(bare, "a", images=[picture_file(tmp_path)])


@pytest.mark.slow
def test_pairs_from_a_file_calibrate_and_validate(llava, tmp_path):
    lines = [{"image": picture_file(tmp_path, seed).name, "text": "what is on it?" + "!" * seed} for seed in range(3)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    result = export(llava, recipe_of("w8a8_static"), out_dir=out, calibration=pairs)
    assert "3 pictures with text of pairs.jsonl" in result.parts[DECODER].calibration
    report = validate(out, llava, text=str(pairs), windows=3, greedy=3)
    assert report.logits.tokens == 3 * 14 and report.logits.kl_mean < 0.5  # of each text the part behind the picture
    assert set(report.parts) == {VISION, EMBEDDING, DECODER} and report.text.startswith("3 pictures")
    assert json.loads((out / "report.json").read_text())["validation"]["logits"]["windows"] == 3


@pytest.mark.parametrize("line, said", [('{"text": "a"}', "pairs.jsonl:1"), ("", "holds no pictures")])
def test_bad_pairs_are_named_at_the_start(llava, tmp_path, line, said):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(line)
    with pytest.raises(InputError, match=said):
        export(llava, "w8a8_static", out_dir=tmp_path / "out", calibration=pairs)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["self", "text"])
def test_drawn_pictures_go_with_text(llava, tmp_path, source):
    if source == "text":
        source = str(tmp_path / "text.txt")
        (tmp_path / "text.txt").write_text("words and more words " * 40)
    parts = capture_vision_language(open_model(llava))
    examples = load_examples(parts, spec(source), None, no_stage_progress)
    assert sum(len(example.input_ids) for example in examples.batches) == 3 and not examples.own
    feeds = float_feeds(parts, examples.batches)
    for example, merged in zip(examples.batches, feeds[DECODER], strict=True):
        assert (example.input_ids == 127).sum(1).tolist() == [16] * len(example.input_ids)
        want = decoder_feeds(parts, example, {"inputs_embeds": merged["inputs_embeds"]})
        assert want.keys() == {port.name for port in parts.decoder.inputs}


@pytest.mark.slow
def test_inspect_sums_its_parts(llava):
    found = inspect(llava, "balanced")
    assert set(found.parts) == {VISION, EMBEDDING, DECODER} and found.attention == "grouped"
    assert found.bytes["total"] == sum(part.bytes["total"] for part in found.parts.values())
    with pytest.raises(InputError, match="only measured when it is exported"):
        inspect(llava, "w8a8_static", calibrate=True)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["smolvlm", "llava"], indirect=True)
def test_a_shared_table_has_codes_in_both_files(folder):
    found = inspect(folder, Recipe(scheme="w4a16_g32", lm_head="w8a16_g32", embedding="tied"))
    schemes = [table.scheme and table.scheme.name for table in found.embeddings]
    assert schemes == (["w8a16_g32"] if folder.name.startswith("smolvlm") else [None])


def test_a_conversation_about_pictures_is_read_whole_every_time(llava, float_files, tmp_path):
    from PIL import Image

    model, processor, picture = eager(llava), AutoProcessor.from_pretrained(llava), picture_file(tmp_path)
    talk = Chat(float_files, max_new_tokens=5)
    first = talk.say("what is it", images=[picture])
    assert first == generate(float_files, "what is it", images=[picture], chat=True, max_new_tokens=5)[0]
    said = [*talk.turns, {"role": "user", "content": [{"type": "text", "text": "and now"}]}]
    text = processor.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    made = processor(text=[text], images=[[Image.open(picture)]], add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        want = model.generate(**made, max_new_tokens=5, do_sample=False, suppress_tokens=[127])
    assert text.count("<image>") == 1
    want = processor.tokenizer.decode(want[0, made["input_ids"].shape[1] :], skip_special_tokens=True)
    assert talk.say("and now") == want
    talk.forget()
    assert not talk.turns and talk.say("no picture") is not None


def test_guesses_leave_out_tokens_that_stand_for_pictures(float_files, tmp_path):
    given = {"images": [picture_file(tmp_path)], "max_new_tokens": 12}
    prompt = "a<image>a"  # behind which a lookup finds the picture's tokens
    wanted = generate(float_files, prompt, **given)
    assert generate(float_files, prompt, **given, drafts=Drafts("lookup", rows=4)) == wanted


def test_speed_is_that_of_text_behind_a_picture(float_files):
    plan = manifests.load(float_files / DECODER)
    given = {"manifest": plan.model_dump(mode="json"), "threads": 1, "provider": None, "max_length": 16}
    subject = _Subject({**given, "folder": str(float_files)})
    assert subject.load() > 0
    assert subject.prefill(8, 2) > 0 and subject.decode(2) > 0
    subject = _Subject({**given, "folder": str(float_files), "max_length": 4000})
    with pytest.raises(RuntimeProblem, match="4000 tokens behind the 16 of a picture do not fit"):
        subject.load()


@pytest.mark.slow
def test_bench_has_all_files(float_files):
    found = bench(float_files, prompt_lengths=[4], decode_pasts=[4], repeats=1, threads=1)
    assert found.first.model_bytes == sum(path.stat().st_size for path in float_files.glob("*/model.onnx*"))
    assert found.notes == ("every prompt is a picture and so many tokens of text behind it, of which the speed is",)


@pytest.mark.slow
def test_an_interrupted_export_goes_on_where_it_was(llava, tmp_path, monkeypatch):
    quantized = []

    def progress(stage, what, done, total):
        if stage.startswith("decoder: quantize") and done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_one", lambda *args, one=loop._one: (quantized.append(args[1].name), one(*args))[1])
    export(llava, recipe_of("w8a8_static"), out_dir=tmp_path / "whole")
    blocks = list(quantized)
    quantized.clear()
    with pytest.raises(KeyboardInterrupt):
        export(llava, recipe_of("w8a8_static"), out_dir=tmp_path / "out", progress=progress)
    export(llava, recipe_of("w8a8_static"), out_dir=tmp_path / "out", resume=True)
    assert quantized == blocks  # none of them twice
    for part in (VISION, EMBEDDING, DECODER):
        same = [(tmp_path / name / part / "model.onnx.data").read_bytes() for name in ("out", "whole")]
        assert same[0] == same[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
def test_parts_are_placed_on_cuda(llava, tmp_path, cuda_placement):
    from helpers.cuda_placement.models import PROMPT, assert_decoder_on_cuda

    made = export(llava, "w4a16_g32_rtn", out_dir=tmp_path / "out", target="cuda")
    for name, part in made.parts.items():
        # The stand-ins have no convolution to run.
        dims = None if name == VISION else {"num_image_tokens": 8, **PROMPT}
        placed = cuda_placement(part.folder / "model.onnx", part.manifest.session, dims=dims)
        if name == DECODER:
            assert_decoder_on_cuda(placed)
        else:
            assert placed["nodes"].get(manifests.CPU, {}).keys() <= {"Concat"}  # of lengths
            assert placed["memcpy"] == 0
