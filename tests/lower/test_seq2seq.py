"""Encoder-decoders: both files compute what their graphs and transformers compute, padding and cache included."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, ViTImageProcessorPil

from helpers import exports
from helpers.breadth import quick
from helpers.random_modules import SEQ2SEQ, VOCAB, save_seq2seq, seq2seq_loader
from helpers.random_pictures import picture_file
from helpers.runners import captured_runner, load_weights, padded, source_of, stepwise, tokens
from helpers.tokenizer_files import write_word_tokenizer
from qexport import bench, export, export_auto, generate, inspect, optimize, validate
from qexport.api.seq2seq.sources import load_sources, write_about
from qexport.artifact import checksums
from qexport.artifact import manifest as manifests
from qexport.calibrate import loop
from qexport.capture.folder import capture_folder
from qexport.capture.seq2seq import capture_seq2seq
from qexport.errors import CaptureError, InputError, RecipeError
from qexport.models.source import open_model
from qexport.quant.metrics import sqnr_db
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.runtime.seq2seq import open_seq2seq
from qexport.validation.placement import examine

QUICK = ("t5", "whisper")
REFUSED = {
    "prophetnet": "decoder_input_ids. of length 1",
    "fsmt": "no causal mask where it has a cache",
}
FAMILIES = quick(QUICK, among=[name for name in SEQ2SEQ if name not in REFUSED])
MASK = padded([9, 4], "right")
TEXT = tokens(2, 8, 5, vocab=VOCAB)
SIZES = {"Add", "Concat", "Squeeze", "Unsqueeze"}  # arithmetic of lengths
# Of windows, and of what is left of the lengths of sound; and what CUDA computes with cuDNN, not for integers, or not.
MORE_SIZES = {"Cast", "Div", "Gather", "Max", "Min", "Mul", "Neg", "Range", "Sub"}
WITHOUT_KERNEL = {"InstanceNormalization", "Tile", "Asinh"}
KERNELS = {"w4a16_g32": "MatMulNBits", "w8a8_dyn": "MatMulIntegerToFloat", "w8a8_static": "MatMulIntegerToFloat"}


def spec(samples=4):
    return CalibrationSpec(source="random", samples=samples, sequence_length=16, batch_size=2)


def recipe_of(scheme, **fields):
    return Recipe(scheme=scheme, accuracy_level=1, calibration=spec(), **fields)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    return save_seq2seq(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = save_seq2seq("t5", tmp_path_factory.mktemp("model") / "t5", gain=2.0)
    write_word_tokenizer(folder, VOCAB)
    return folder


@pytest.fixture(scope="module")
def exported(t5, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "t5"
    export(t5, recipe_of("w8a8_dyn"), out_dir=out)
    return out


def eager(folder, source):
    kind = seq2seq_loader(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        return kind.from_pretrained(folder).eval()(**source, decoder_input_ids=TEXT).logits


@pytest.mark.slow  # as every export does it
@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_parts_compute_what_transformers_computes(folder):
    parts = capture_seq2seq(open_model(folder))
    source, decoder = source_of(parts.encoder, MASK), load_weights(parts.decoder)
    run = captured_runner(decoder)
    got, _ = stepwise(captured_runner(load_weights(parts.encoder)), run, decoder, source, TEXT)
    want = eager(folder, source)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.each_value_once
@pytest.mark.parametrize("scheme", KERNELS)
@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_files_agree_with_their_graphs(folder, scheme, tmp_path):
    parts = capture_seq2seq(open_model(folder))
    recipe, source = recipe_of(scheme), source_of(parts.encoder, MASK)
    sources = load_sources(parts, recipe.calibration)
    written = write_about(parts, sources, 8, seed=0)
    made = {}
    for name, captured, batches in (
        ("encoder", parts.encoder, sources.batches), ("decoder", parts.decoder, written.batches)
    ):  # fmt: skip
        made[name] = exports.export(captured, recipe, "cpu", tmp_path / name, calibration=batches)
        placed, _ = examine(tmp_path / name, made[name].manifest, manifests.CPU)
        assert not placed.unfused and set(placed.nodes_per_provider) == {manifests.CPU}
        assert {entry.kernel for entry in made[name].manifest.linears} == {KERNELS[scheme]}
    ran, calls = stepwise(
        made["encoder"].in_onnxruntime(), made["decoder"].in_onnxruntime(), made["decoder"].captured, source, TEXT
    )
    encoded, graph = made["encoder"].in_onnxruntime()(source), made["encoder"].in_pytorch()(source)
    pairs = [(graph[name], encoded[name]) for name in graph]
    run = made["decoder"].in_pytorch()
    for feeds, got in calls:  # each step on what the file itself had in its cache
        want = run(feeds)
        pairs += [(want[name], got[name]) for name in want]
    real = MASK.bool()[:, None, :, None]  # of keys and values of the source
    for ours, theirs in pairs:
        if ours.dim() == 4 and ours.shape[2] == MASK.shape[1] and "attention_mask" in source:
            ours, theirs = ours * real, theirs * real
        if scheme == "w4a16_g32":
            assert (ours - theirs).abs().max() < 3e-5 * ours.abs().max()
        else:  # a code here and there falls on the other side
            assert sqnr_db(ours, theirs) > 25
    # A graph that agrees with its file could still be of something else; 4 bits leave little of random weights.
    assert sqnr_db(eager(folder, source), ran) > (15 if scheme != "w4a16_g32" else 4)


def test_the_source_is_read_once_and_written_about_in_batches(exported, t5):
    pair, source = open_seq2seq(exported), source_of(capture_seq2seq(open_model(t5)).encoder, MASK)
    feeds = {name: tensor.numpy() for name, tensor in source.items()}
    with pytest.raises(InputError, match="Read a source first"):
        pair.decoder.run(np.ones((1, 1), np.int64))
    pair.read(feeds)
    both = pair.decoder.generate([[0], [0]], max_new_tokens=6).tokens
    assert len(set(both[0])) > 1 and both[0] != both[1]
    for row in range(2):  # padding beside a row changes nothing
        length = int(MASK[row].sum())
        pair.read({name: array[row : row + 1, :length] for name, array in feeds.items()})
        assert pair.decoder.generate([[0]], max_new_tokens=6).tokens[0] == both[row]
    with pytest.raises(InputError, match="the encoder reads input_ids, attention_mask"):
        pair.read({"input_ids": feeds["input_ids"]})


def test_it_writes_as_its_configs_say(exported, t5, tmp_path):
    source = source_of(capture_seq2seq(open_model(t5)).encoder, MASK)
    feeds = {name: tensor[:1, :4].numpy() for name, tensor in source.items()}
    plain = open_seq2seq(exported).write(feeds, max_new_tokens=6).tokens[0]
    out = shutil.copytree(exported, tmp_path / "out")

    def written(**changes):
        (out / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 0, **changes}))
        return open_seq2seq(out).write(feeds, max_new_tokens=6).tokens[0]

    assert plain[0] not in written(suppress_tokens=[plain[0]])
    assert written(begin_suppress_tokens=[plain[0]])[0] != plain[0]
    assert written(eos_token_id=plain[0]) == plain[:1]
    forced = written(forced_decoder_ids=[[1, plain[0]], [2, None]])
    assert forced[:5] == plain[1:6]
    prompted = open_seq2seq(exported).write(feeds, max_new_tokens=5, prompts=[[0, plain[0]]]).tokens[0]
    assert prompted == forced[:5]
    (out / "generation_config.json").write_text("{}")
    (out / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no decoder_start_token_id"):
        open_seq2seq(out)


def test_text_in_text_out(exported):
    pieces = ["", ""]

    def on_text(row, piece):
        pieces[row] += piece

    texts = generate(exported, ["a long text", "moon"], max_new_tokens=5, on_text=on_text)
    assert texts == pieces and all(texts) and texts[1] == generate(exported, "moon", max_new_tokens=5)[0]


def test_it_is_validated_whole_and_in_parts(exported, t5, tmp_path):
    out = shutil.copytree(exported, tmp_path / "out")
    text = " ".join(f"word {i}" for i in range(40))
    report = validate(out, t5, text=text, windows=3, window=12, greedy=6)
    assert not report.problems and report.logits.windows == 3 and 0 < report.logits.kl_mean < 0.2
    assert "12 tokens" in report.text and not report.own_text and max(report.greedy.agreed) == 6
    assert [row.name for row in report.parts["decoder"].outputs] == ["logits"]
    encoder = report.parts["encoder"]
    assert len(encoder.layers.linears) == 6 + 4 and len(encoder.outputs) == 4
    assert [row.name for row in report.layers.blocks][:1] == ["encoder/" + encoder.layers.blocks[0].name]
    assert len(report.layers.linears) == sum(len(part.layers.linears) for part in report.parts.values())
    kept = json.loads((out / "report.json").read_text())["validation"]
    assert kept["logits"]["kl_mean"] == report.logits.kl_mean and "parts" not in kept
    assert (out / "encoder" / "report.html").exists() and (out / "decoder" / "report.html").exists()
    # A decoder that hears little of its source is found where it is.
    broken = json.loads((out / "decoder" / "manifest.json").read_text())
    broken["linears"][0]["kernel"] = "MatMulNBits"
    (out / "decoder" / "manifest.json").write_text(json.dumps(broken))
    checksums.write(out / "decoder")
    found = validate(out, t5, text=text, windows=1, window=12, greedy=2)
    assert len(found.problems) == 1 and found.problems[0].startswith("decoder: 1 linear is not fused")


def test_what_the_float_model_writes_has_no_end_in_it(t5):
    parts = capture_seq2seq(open_model(t5))
    sources = load_sources(parts, spec(3))
    for seed in (None, 0):
        ids = torch.cat([batch["input_ids"] for batch in write_about(parts, sources, 30, seed=seed).batches])
        assert ids.shape == (3, 31) and (ids[:, 0] == 0).all() and not (ids == parts.model.config.eos_token_id).any()
    greedy = write_about(parts, sources, 30).batches
    for batch, source in zip(greedy, sources.batches, strict=True):
        ids = batch["input_ids"]
        with torch.no_grad():
            logits = parts.model(**source, decoder_input_ids=ids[:, :-1]).logits
        logits[..., parts.model.config.eos_token_id] = -torch.inf
        assert torch.equal(logits.argmax(-1), ids[:, 1:])
        states = parts.model.get_encoder()(**source).last_hidden_state
        key = parts.model.get_decoder().block[1].layer[1].EncDecAttention.k(states)
        got = batch["cross_key_values.1.key"]
        assert torch.allclose(got.transpose(1, 2).flatten(2), key, atol=1e-5)


def test_overrides_match_in_either_part_and_must_match(t5, tmp_path):
    overrides = [{"match": "decoder.block.1.*", "scheme": "float"}, {"match": "lm_head", "scheme": "w8a16_g32"}]
    recipe = recipe_of("w4a16_g32_rtn".removesuffix("_rtn"), weights={"method": "rtn"}, overrides=overrides)
    result = export(t5, recipe, out_dir=tmp_path / "out")
    kept = {p.name for p in result.parts["decoder"].plan if p.scheme is None} | {
        p.name for p in result.parts["encoder"].plan if p.scheme is None
    }
    assert kept and all(name.startswith("decoder.block.1.") for name in kept)
    assert {p.name for p in result.parts["encoder"].plan if p.scheme is None} == {  # which reads what the encoder makes
        f"decoder.block.1.layer.1.EncDecAttention.{part}" for part in "kv"
    }
    assert result.parts["decoder"].manifest.linears[-1].scheme == "w8a16_g32"
    found = inspect(t5, recipe)
    assert [p.name for p in found.parts["encoder"].linears] == [p.name for p in result.parts["encoder"].plan]
    with pytest.raises(RecipeError, match="matches no linear.*nowhere"):
        export(t5, recipe_of("w4a16_g32", overrides=[{"match": "nowhere", "scheme": "float"}]), out_dir="x")


def test_an_interrupted_export_goes_on_where_it_was(exported, t5, tmp_path, monkeypatch):
    out, quantized = tmp_path / "out", []

    def progress(stage, what, done, total):
        if stage.startswith("decoder: quantize") and done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_one", lambda *args, one=loop._one: (quantized.append(args[1].name), one(*args))[1])
    with pytest.raises(KeyboardInterrupt):
        export(t5, recipe_of("w8a8_dyn"), out_dir=out, progress=progress)
    before = list(quantized)
    with pytest.raises(InputError, match="another model, recipe"):
        export(t5, recipe_of("w4a16_g32"), out_dir=out, resume=True)
    export(t5, recipe_of("w8a8_dyn"), out_dir=out, resume=True)
    parts = capture_seq2seq(open_model(t5))
    assert len(before) == len(parts.encoder.blocks) + 1  # the first of the decoder's, too
    assert quantized == [block.name for block in (*parts.encoder.blocks, *parts.decoder.blocks)]
    for part in ("encoder", "decoder"):
        same = [(folder / part / "model.onnx.data").read_bytes() for folder in (out, exported)]
        assert same[0] == same[1]
    assert not list(tmp_path.glob(".*"))


def test_features_come_from_a_tensor_or_a_file(tmp_path):
    folder = save_seq2seq("whisper", tmp_path / "model")
    parts = capture_seq2seq(open_model(folder))
    spectra = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(1))
    save_file({"input_features": spectra}, tmp_path / "spectra.safetensors")
    given = load_sources(parts, spec(), spectra)
    path = str(tmp_path / "spectra.safetensors")
    read = load_sources(parts, CalibrationSpec(source=path, batch_size=2, samples=2))
    assert torch.equal(torch.cat([b["input_features"] for b in given.batches]), spectra)
    assert torch.equal(read.batches[0]["input_features"], spectra[:2]) and len(read.batches) == 1
    with pytest.raises(InputError, match=r"\[3, 8, 32\], not \[n, 16, 32\]"):
        load_sources(parts, spec(), spectra[:, :8])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_sources(parts, CalibrationSpec(source=str(tmp_path / "none.safetensors")))
    export(folder, recipe_of("w8a8_static"), out_dir=tmp_path / "out", calibration=path)
    write_word_tokenizer(tmp_path / "out", VOCAB)
    with pytest.raises(InputError, match="reads input_features, not text"):
        generate(tmp_path / "out", "some text")
    written = generate(tmp_path / "out", inputs={"input_features": spectra[:2].numpy()}, max_new_tokens=4)
    assert len(written) == 2 and all(written)
    begun = generate(tmp_path / "out", inputs={"input_features": spectra[:1].numpy()}, start=[1, 5], max_new_tokens=4)
    assert len(begun) == 1
    report = validate(tmp_path / "out", folder, inputs=spectra, greedy=4)
    assert not report.problems and report.logits.windows == 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["speech_to_text", "moonshine"])
def test_sound_of_any_length_is_calibrated_compared_and_written_down(family, tmp_path):
    folder = save_seq2seq(family, tmp_path / "model", gain=1.5)
    parts = capture_seq2seq(open_model(folder))
    name, *_ = [port.name for port in parts.encoder.inputs]
    source = source_of(parts.encoder, MASK)
    rows = [row[kept.bool()] for row, kept in zip(source[name], source["attention_mask"], strict=True)]
    save_file(source, tmp_path / "sound.safetensors")
    path = str(tmp_path / "sound.safetensors")
    read = load_sources(parts, CalibrationSpec(source=path, batch_size=2))
    assert [batch[name].shape[:2] for batch in read.batches] == [(1, len(row)) for row in sorted(rows, key=len)]
    assert all(batch["attention_mask"].all() for batch in read.batches)
    export(folder, recipe_of("w8a8_static"), out_dir=tmp_path / "out", calibration=rows)
    write_word_tokenizer(tmp_path / "out", VOCAB)
    whole, masked = ({n: t[:1].numpy() for n, t in source.items() if n in kept} for kept in ([name], source))
    assert generate(tmp_path / "out", inputs=whole, max_new_tokens=4) == generate(
        tmp_path / "out", inputs=masked, max_new_tokens=4
    )
    pair = open_seq2seq(tmp_path / "out")
    pair.read({n: t.numpy() for n, t in source.items()})
    with torch.no_grad():
        want = parts.model(**source, decoder_input_ids=TEXT[:, :1]).logits
    assert sqnr_db(want, torch.tensor(pair.decoder.run(TEXT[:, :1].numpy()))) > 15
    report = validate(tmp_path / "out", folder, inputs=rows, greedy=4)
    assert not report.problems and report.logits.windows == 2
    found = bench(tmp_path / "out", prompt_lengths=[len(rows[0])], decode_pasts=[len(rows[1])], repeats=1, threads=1)
    assert found.first.samples.keys() == {"load", f"prefill:{len(rows[0])}", f"decode:{len(rows[1])}"}


@pytest.mark.slow
def test_pictures_are_written_about(tmp_path):
    folder = save_seq2seq("vision_encoder_decoder", tmp_path / "model", gain=1.5)
    size = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=size, do_resize=True).save_pretrained(folder)
    out = tmp_path / "out"
    export(folder, recipe_of("w8a8_dyn"), out_dir=out)
    write_word_tokenizer(out, VOCAB)
    files = [picture_file(tmp_path, seed) for seed in (0, 1)]
    pixels = ViTImageProcessorPil(size=size)([Image.open(file) for file in files], return_tensors="np")["pixel_values"]
    texts = generate(out, images=files, max_new_tokens=6)
    assert len(texts) == 2 and texts == generate(out, inputs={"pixel_values": pixels}, max_new_tokens=6)
    assert len(generate(out, images=files[:1], max_new_tokens=100)[0]) <= 64 * 2, "as far as its positions go"
    report = validate(out, folder, inputs=torch.tensor(pixels), greedy=4)
    assert not report.problems and report.logits.windows == 2 and 0 < report.logits.kl_mean < 0.5
    assert "pictures of 32 x 32 pixels" in bench(out, repeats=1, threads=1).notes[0]
    with pytest.raises(InputError, match="reads pictures of 32 x 32 pixels, and no others"):
        bench(out, prompt_lengths=[6])


def test_pictures_are_for_those_that_read_them(exported, tmp_path):
    with pytest.raises(InputError, match="its encoder reads input_ids, attention_mask, not pictures"):
        generate(exported, images=[picture_file(tmp_path)])


def test_what_takes_one_file_says_which(exported, t5, tmp_path):
    with pytest.raises(InputError, match="two exports.*decoder"):
        manifests.load(exported)
    with pytest.raises(CaptureError, match="two exports in one folder"):
        capture_folder(open_model(t5))
    with pytest.raises(InputError, match="not an export of an encoder-decoder"):
        open_seq2seq(exported / "decoder")
    with pytest.raises(InputError, match="exists already"):
        export(t5, out_dir=exported)
    for given in ({"greedy": 1}, {"text": "a", "inputs": ["a"]}):
        with pytest.raises(InputError, match="too few to compare|both give the sources"):
            validate(exported, t5, **given)
    with pytest.raises(InputError, match="cannot write its own calibration text"):
        export_auto(t5, out_dir=tmp_path / "out", max_kl=1.0)
    with pytest.raises(InputError, match="nothing to continue, or too much"):
        generate(exported)
    with pytest.raises(RecipeError, match="kv_cache"):
        export(t5, recipe_of("w4a16_g32", kv_cache="int8"), out_dir=tmp_path / "out")
    part = shutil.copytree(exported / "decoder", tmp_path / "decoder")
    optimize(part)
    assert (part / "optimized").is_dir() and not (tmp_path / "out").exists()


@pytest.mark.by_default("t5")
@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_nothing_but_sizes_falls_back_to_the_cpu_on_cuda(folder, cuda_placement, tmp_path):
    parts = capture_seq2seq(open_model(folder))
    for captured, out in ((parts.encoder, tmp_path / "encoder"), (parts.decoder, tmp_path / "decoder")):
        made = exports.export(captured, Recipe(scheme="w4a16_g32", weights={"method": "rtn"}), "cuda", out)
        # The stand-ins have no convolution to run.
        reads_text = captured.inputs[0].name == "input_ids"
        read = {"batch_size": 2, "encoder_sequence_length": 16, "sequence_length": 1, "past_sequence_length": 3}
        dims = read if reads_text else None
        placed = cuda_placement(out / "model.onnx", made.manifest.session, dims=dims)
        away = set(placed["nodes"].get(manifests.CPU, ()))
        if parts.encoder.inputs[0].name == "input_ids" and not folder.name.startswith("led"):
            assert placed["memcpy"] == 0 and away <= SIZES, placed["nodes"][manifests.CPU]
        else:
            assert placed["memcpy"] <= 2 and away <= SIZES | MORE_SIZES | WITHOUT_KERNEL, placed["nodes"][manifests.CPU]


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_captured_is_refused(family, tmp_path):
    with pytest.raises(CaptureError, match=REFUSED[family]):
        capture_seq2seq(open_model(save_seq2seq(family, tmp_path)))
