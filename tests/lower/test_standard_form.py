"""Form qdq: operators of ONNX alone, the numbers of the native form, and the same kernels in ONNX Runtime."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from helpers import exports
from helpers.agreement import ROUNDING, assert_agree, logits, module_differences
from helpers.breadth import quick
from helpers.cuda_placement.models import CUDA, PROMPT
from helpers.random_decoders import reference_model
from helpers.random_modules import VOCAB, save_encoder
from helpers.runners import padded, prompt_feeds, tokens
from qexport.artifact.manifest import MODEL_FILE
from qexport.calibrate.encoder_inputs import encoder_batch
from qexport.errors import LoweringError
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe
from qexport.runtime.decoder import open_decoder
from qexport.runtime.session import optimized_graph, unfused

FLOAT = Recipe(scheme="w8a8_dyn", overrides=(Override(match="*", scheme="float"),))
RANDOM = CalibrationSpec(source="random", samples=2, sequence_length=8)
MASK = padded([9, 4, 6], "left")
INTEGER = "MatMulIntegerToFloat"
KERNELS = {
    "w4a16_g32": "MatMulNBits", "w3a16_g64": "MatMulNBits", "w4a16_g16_asym": "MatMulNBits",
    "w4a16_g512": "MatMulNBits", "w4a16_pc": "MatMulNBits", "w8a16_g32": "MatMulNBits", "w4a8_g32": "MatMulNBits",
    "w4a8_g32_static": "MatMulNBits", "w8a8_dyn": INTEGER, "w8a8_static": INTEGER, "w4a8": INTEGER,
    "w4a8_g32_int": INTEGER, "w4a4": INTEGER,
}  # fmt: skip
QUICK_ON_CUDA = ("w4a16_g32", "w4a16_g16_asym", "w4a16_pc", "w4a8_g32_static", "w8a8_dyn", "w8a8_static")
ON_CUDA = dict.fromkeys(KERNELS, "MatMulNBits") | {"w8a8_static": "MatMul"}


def recipe_of(scheme, **fields):
    return Recipe(**{"scheme": scheme, "lm_head": scheme, "accuracy_level": 1, "calibration": RANDOM, **fields})


def tied(scheme, **fields):
    return recipe_of("w4a16_g32", lm_head=scheme, embedding="tied", **fields)


def assert_standard(folder, opset):
    """No operator of ONNX Runtime's own, and nothing that the checker of ONNX minds."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    assert [(known.domain, known.version) for known in model.opset_import] == [("", opset)]
    onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
    return Counter(node.op_type for node in model.graph.node)


def blocks_of(folder):
    """(input features, block) of every weight that is dequantized in blocks."""
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    for node in graph.node:
        block = next((a.i for a in node.attribute if a.name == "block_size"), 0)
        if block:
            yield rows[node.input[0]], block


def in_reference(exported):
    """The first logits that the reference evaluator of ONNX computes of a file, and ONNX Runtime's."""
    feeds = prompt_feeds(exported.captured, tokens(3, 9), MASK)
    model = onnx.load(exported.folder / MODEL_FILE)
    named = {value.name: feeds[value.name].numpy() for value in model.graph.input}
    (found,) = ReferenceEvaluator(model).run(["logits"], named)
    return torch.from_numpy(np.asarray(found)), exported.in_onnxruntime()(feeds)["logits"]


@pytest.mark.by_default("w8a8_static-*", "w4a8-*", "w4a8_g32_int-*", "w4a16_pc-*", "w4a16_g16_asym-*", "w3a16_g64-*")
@pytest.mark.parametrize("opset", [21, 23, 25])
@pytest.mark.parametrize("scheme", quick(KERNELS.keys() - {"w8a16_g32", "w4a8_g32", "w4a4"}, among=KERNELS))
@pytest.mark.each_value_once
def test_decoder_says_and_computes_what_the_native_form_does(export, scheme, opset):
    exported = export("llama_bias", recipe_of(scheme), form="qdq", opset=opset)
    written = assert_standard(exported.folder, opset)
    assert ("Attention" in written) == (opset >= 23) and "DequantizeLinear" in written
    assert exported.manifest.settings["form"] == "qdq" and exported.manifest.settings["opset"] == opset

    assert {entry.kernel for entry in exported.manifest.linears} == {KERNELS[scheme]}
    graph = optimized_graph(exported.folder, exported.manifest)
    assert unfused(graph, exported.manifest.linears) == []
    assert graph.op_counts()[KERNELS[scheme]] == len(exported.products())

    flips = 0.02 if "a8" in scheme or "a4" in scheme[3:] else 0
    for features, block in blocks_of(exported.folder):
        assert block <= 256 and features % block == 0  # none is shorter than the others
    assert_agree(exported, MASK, flips)
    native = export("llama_bias", recipe_of(scheme), attention="standard")
    ours, theirs = logits(MASK, *((e.in_onnxruntime(), e.captured, torch.float32) for e in (exported, native)))
    wrong = (ours - theirs).abs().amax(-1) > ROUNDING * theirs.abs().max()
    assert wrong.float().mean() <= flips


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a8_dyn"])
def test_reference_evaluator_computes_the_same(export, scheme, opset):
    reference, ran = in_reference(export("llama_bias", recipe_of(scheme), form="qdq", opset=opset))
    real = MASK.bool()
    assert (reference - ran)[real].abs().max() < 1e-4 * ran[real].abs().max()


@pytest.mark.by_default("w4a16_g16_asym", "w2a16_g16")
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g16_asym", "w8a16_g32", "w2a16_g16"])
def test_table_of_codes_is_in_the_file_once_and_read_alike(export, scheme):
    opset = 25 if scheme == "w2a16_g16" else 21
    exported = export("llama_bias", tied(scheme), form="qdq", opset=opset)
    assert_standard(exported.folder, opset)
    assert unfused(optimized_graph(exported.folder, exported.manifest), exported.manifest.linears) == []
    assert_agree(exported, MASK, flips=0)
    native = export("llama_bias", tied(scheme), attention="standard")
    # Without the operators around it the files differ by less than the constants of one.
    assert abs(exported.manifest.bytes["embedding"] - native.manifest.bytes["embedding"]) < 512
    reference, ran = in_reference(exported)
    assert (reference - ran)[MASK.bool()].abs().max() < 1e-4 * ran.abs().max()


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a16_g64_asym"])
def test_table_that_nothing_shares(export, scheme):
    exported = export("opt", recipe_of("w4a16_g32", embedding=scheme), form="qdq")
    assert_standard(exported.folder, 23)
    assert_agree(exported, MASK, flips=0)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "gpt_oss", "opt")]


@pytest.mark.parametrize("family", ["gpt_neox", *SLOW])
@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.each_value_once
def test_other_families(export, family, opset):
    exported = export(family, recipe_of("w4a16_g32"), form="qdq", opset=opset)
    assert_standard(exported.folder, opset)
    assert_agree(exported, MASK, flips=0)


@pytest.mark.slow
def test_mixture_of_experts_is_computed_by_every_expert(export):
    exported = export("qwen2_moe", recipe_of("w4a16_g32"), form="qdq")
    assert "QMoE" not in {entry.kernel for entry in exported.manifest.linears}
    assert_standard(exported.folder, 23)
    assert_agree(exported, MASK, flips=0)


@pytest.mark.by_default("23-w4a8_g32_static", "23-w8a8_static", "21-w8a8_dyn", "21-w4a16_g16_asym")
@pytest.mark.parametrize("scheme", quick(QUICK_ON_CUDA, among=KERNELS))
@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.each_value_once
def test_all_of_a_decoder_is_on_cuda(export, cuda_placement, scheme, opset):
    exported = export("llama", recipe_of(scheme), "cuda", form="qdq", opset=opset)
    assert_standard(exported.folder, opset)
    assert {entry.kernel for entry in exported.manifest.linears} == {ON_CUDA[scheme]}
    placed = cuda_placement(exported.folder / MODEL_FILE, exported.manifest.session, dims=PROMPT)
    assert set(placed["nodes"]) == {CUDA} and placed["memcpy"] == 0
    products = Counter(placed["optimized_ops"])[ON_CUDA[scheme]]
    assert products == len(exported.products()) or ON_CUDA[scheme] == "MatMul" and products > len(exported.products())
    assert_agree(export("llama", recipe_of(scheme), "cuda", single=True, form="qdq", opset=opset), MASK, flips=0.02)


@pytest.mark.parametrize("opset", [21, 23])
def test_encoder(tmp_path, opset):
    folder = save_encoder("bert", tmp_path / "bert")
    recipe = recipe_of("w4a16_g32", lm_head="float")
    exported = exports.export(exports.capture(folder), recipe, "cpu", tmp_path / "out", form="qdq", opset=opset)
    assert_standard(exported.folder, opset)
    mask = padded([6, 2, 9], "right")
    feeds = encoder_batch(exported.captured, tokens(*mask.shape, vocab=VOCAB), mask)
    assert module_differences(exported, feeds).max() < ROUNDING


REFUSED = {
    ("nf4", "--form", "qdq"): "a table of values",
    ("w2a16_g64", "--form", "qdq"): "2-bit codes, which ONNX has from opset 25 on",
    ("w4a16_g32_kv8", "--form", "qdq"): "a cache of codes needs grouped attention",
    ("w4a16_g32_int8_prompts", "--form", "qdq"): "second copy of the weights",
    ("w4a16_g32", "--form", "qdq", "--opset", "20"): "is not one of 21 to 25",
    ("w4a16_g32", "--opset", "21"): "the native form has one opset",
    ("w4a16_g32", "--form", "standard"): "unknown form 'standard'",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
@pytest.mark.parametrize("command", ["inspect", "export"])
@pytest.mark.each_value_once
def test_what_onnx_cannot_say_is_refused_in_a_sentence(run, model_folder, tmp_path, command, arguments):
    out = ["-o", str(tmp_path / "out")] if command == "export" else []
    code, _, stderr = run(command, str(model_folder("llama")), "--recipe", *arguments, *out)
    assert code == 2 and "Traceback" not in stderr
    assert REFUSED[arguments] in " ".join(stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g16_asym", "w8a8_dyn", "w8a8_static"])
def test_openvino_computes_the_same(export, scheme, opset):
    openvino = pytest.importorskip("openvino")
    exported = export("llama_bias", tied(scheme) if "a16" in scheme else recipe_of(scheme), form="qdq", opset=opset)
    feeds = prompt_feeds(exported.captured, tokens(3, 9), MASK)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
    model = openvino.Core().compile_model(exported.folder / MODEL_FILE, "CPU", exact)
    ran = torch.from_numpy(model({name: value.numpy() for name, value in feeds.items()})["logits"])
    ours, real = exported.in_onnxruntime()(feeds)["logits"], MASK.bool()
    difference = (ran - ours)[real].abs().amax(-1) / ours[real].abs().max()
    assert (difference > 1e-4).float().mean() <= (0.1 if "a8" in scheme else 0)
    assert difference.max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lfm2", "mamba"])
def test_states_of_a_convolution_or_a_scan(model_folder, tmp_path, family):
    exported = exports.exporting.export(model_folder(family), FLOAT, out_dir=tmp_path / "out", form="qdq").folder
    assert_standard(exported, 23)
    ids = tokens(1, 9)
    with torch.no_grad():
        want = reference_model(model_folder(family))(ids).logits
    got = torch.from_numpy(open_decoder(exported).run(ids.numpy()).copy())
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba2", "qwen3_5"])
def test_linear_attention_has_none(model_folder, tmp_path, family):
    with pytest.raises(LoweringError, match="in ONNX's own operators"):
        exports.exporting.export(model_folder(family), FLOAT, out_dir=tmp_path / "out", form="qdq")
