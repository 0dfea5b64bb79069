"""Exports to CUDA in bfloat16: placed there, in bfloat16 throughout, near their graph; what has no kernels is refused.

Placement is seen on stand-in libraries. Numbers come from the CPU provider, every node between casts (see widening.py).
"""

import shutil
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

import qexport
from helpers import agreement
from helpers.agreement import assert_float16_adds_little
from helpers.bfloat16_on_cpu import widen
from helpers.cuda_placement.models import CPU, CUDA, PROMPT, assert_decoder_on_cuda
from helpers.runners import padded
from helpers.tokenizer_files import write_word_tokenizer
from qexport.api.validating import validate
from qexport.errors import InputError, RuntimeProblem
from qexport.plan.linear_plan import LinearPlan
from qexport.quant.formats import Scheme
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe
from qexport.recipe.registry import section
from qexport.runtime import session
from qexport.runtime.decoder import open_decoder
from qexport.targets.cuda import CudaTarget

MASK = padded([9, 4, 6], "left")
SCHEMES = {
    "w4a16_g32": "MatMulNBits", "w4a16_g64_asym": "MatMulNBits", "w2a16_g32": "MatMulNBits",
    "w8a16_g32": "MatMulNBits", "nf4": "MatMulBnb4",
}  # fmt: skip
METHODS = {
    "lorc": {"lorc": section("lorc", rank=4)}, "kv8": {"kv_cache": {"bits": 8}}, "kv4": {"kv_cache": {"bits": 4}},
    "tied": {"embedding": "tied"},
}  # fmt: skip
FLOAT = {"scheme": "w8a8_dyn", "lm_head": "float", "overrides": (Override(match="*", scheme="float"),)}


def recipe_of(scheme="w4a16_g32", **more):
    calibration = CalibrationSpec(source="random", samples=4, sequence_length=16)
    weights = {"method": "rtn"}
    return Recipe(**{"scheme": scheme, "lm_head": scheme, "calibration": calibration, "weights": weights, **more})


RECIPES = {s: recipe_of(s) for s in SCHEMES} | {n: recipe_of(**m) for n, m in METHODS.items()}
RECIPES |= {"float": recipe_of(**FLOAT)}


@pytest.fixture
def export(export):
    return lambda recipe, family="llama_bias", **more: export(family, recipe, "cuda", dtype="bfloat16", **more)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """For widened files. A cache between casts would get the memory of the one before, which is shorter."""
    plain = session.session_options

    def without_reuse(*args, **options):
        made = plain(*args, **options)
        made.enable_mem_reuse = False
        return made

    monkeypatch.setattr(session, "session_options", without_reuse)


def tensors_of(folder):
    model = onnx.load(folder / "model.onnx")
    return model, {t.name: t for t in model.graph.initializer}


def as_torch(tensor):
    return torch.from_numpy(onnx.numpy_helper.to_array(tensor).view(np.int16).copy()).view(torch.bfloat16)


# ---- placement and contents -----------------------------------------------------------------------------------------


@pytest.mark.by_default("w4a16_g64_asym", "nf4", "lorc", "kv8", "tied")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_node_is_on_cuda_and_every_float_a_bfloat16(export, cuda_placement, recipe):
    exported = export(recipe)
    manifest = exported.manifest
    assert manifest.dtype == "bfloat16" and manifest.numerics["dtype"].startswith("bfloat16;")
    placed = cuda_placement(exported.folder / "model.onnx", manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    kernels = Counter(exported.products().values())
    assert {kernel: placed["optimized_ops"][kernel] for kernel in kernels} == kernels
    assert {e.kernel for e in manifest.linears if e.name != "lm_head"} <= {SCHEMES.get(recipe.scheme)}
    model, tensors = tensors_of(exported.folder)
    kinds = {t.data_type for t in tensors.values()}
    assert TensorProto.BFLOAT16 in kinds and TensorProto.FLOAT16 not in kinds
    ports = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]}
    codes = {"kv8": TensorProto.INT8, "kv4": TensorProto.UINT8}
    cache = next((k for n, k in codes.items() if RECIPES[n] is recipe), TensorProto.BFLOAT16)
    assert ports["logits"] == TensorProto.BFLOAT16
    assert {kind for name, kind in ports.items() if name.startswith(("past", "present"))} == {cache}


def test_tensors_are_those_of_the_model_in_bfloat16(export):
    exported = export(recipe_of(**FLOAT), family="llama")
    _, tensors = tensors_of(exported.folder)
    found = 0
    for name in {name for block in exported.captured.blocks for name in block.parameters}:
        want = exported.captured.load(name).bfloat16()
        stored = tensors.get(f"{name}.T") or tensors.get(name)
        if stored is not None and stored.data_type == TensorProto.BFLOAT16:
            got = as_torch(stored)
            assert torch.equal(got.t() if stored.name.endswith(".T") else got, want)
            found += 1
    assert found > 10


@pytest.mark.parametrize(("family", "attention"), [("gemma3", "grouped"), ("gpt_neox", "grouped"), ("opt", "standard")])
def test_families_run_on_cuda(export, cuda_placement, family, attention):
    exported = export(recipe_of(lm_head="float"), family, attention=attention)
    placed = cuda_placement(exported.folder / "model.onnx", exported.manifest.session, dims=PROMPT)
    assert placed["memcpy"] == 0 and "MatMulNBits" in placed["optimized_ops"]
    assert not set(placed["nodes"].get(CPU, ())) - {"Cast", "Sub", "Squeeze", "Concat", "Gather", "Add"}  # of lengths


class Clamped(torch.nn.Module):
    """Operators that have float16 kernels and no bfloat16 ones, between linears."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x):
        x = self.first(x).clamp(-1, 1)
        x = x / (x.abs().amax(-1, keepdim=True) + 1)
        x = torch.where(x > 0.1, x, torch.rsqrt(x * x + 1) - torch.log(x.abs() + 1).round())
        return self.second(x)


def test_operators_without_a_bfloat16_kernel_compute_in_float32(cuda_placement, on_the_cpu, tmp_path):
    torch.manual_seed(0)
    model, x = Clamped(), torch.randn(5, 64)
    result = qexport.export(
        model, recipe_of(), out_dir=tmp_path / "out", target="cuda", dtype="bfloat16", example_inputs=(x,),
        calibration=[(x,)],
    )  # fmt: skip
    placed = cuda_placement(result.folder / "model.onnx", result.manifest.session)
    assert set(placed["nodes"]) == {CUDA} and placed["optimized_ops"]["MatMulNBits"] == 2
    widen(result.folder)
    report = validate(result.folder, model, inputs=[(x,)], provider=CPU)
    (row,) = report.outputs
    assert row.sqnr_db > 15 and report.layers.blocks


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.by_default("w4a16_g64_asym", "nf4", "lorc")
@pytest.mark.parametrize("name", ["w4a16_g64_asym", "w2a16_g32", "nf4", "lorc", "tied"])
def test_the_file_is_as_near_to_float32_as_its_graph(export, captured, on_the_cpu, tmp_path, name):
    half = export(RECIPES[name])
    single = agreement.export(captured("llama_bias"), RECIPES[name], "cuda", tmp_path / "single", single=True)
    widen(half.folder)
    assert_float16_adds_little(half, single, MASK)


@pytest.mark.by_default("kv8")
@pytest.mark.parametrize("name", ["w8a16_g32", "kv8"])
def test_decoder_generates_with_a_shared_buffer_what_it_does_in_float16(captured, tmp_path, name):
    logits, caches = {}, {}
    for dtype in ("bfloat16", "float16"):
        exported = agreement.export(captured("llama"), RECIPES[name], "cuda", tmp_path / dtype, dtype=dtype)
        folder = widen(exported.folder) if dtype == "bfloat16" else exported.folder
        decoder = open_decoder(folder, provider=CPU, threads=1, max_length=24)
        found = decoder.generate([[5, 6, 7], [9, 8, 7, 11, 12]], max_new_tokens=4)
        assert [len(row) for row in found.tokens] == [4, 4]
        decoder.reset()
        steps = [decoder.run(np.array([[5, 6, 7]]))[:, -1], decoder.run(np.array([[8]]))[:, -1]]
        logits[dtype], caches[dtype] = np.concatenate(steps), decoder._cache[0].data_type()
    assert logits["bfloat16"].dtype == np.float32 and logits["bfloat16"].shape == (2, 128)
    off = np.abs(logits["bfloat16"] - logits["float16"]).max() / np.abs(logits["float16"]).max()
    assert 0 < off < 0.03
    assert caches == ({d: f"tensor({d})" for d in caches} if name != "kv8" else dict.fromkeys(caches, "tensor(int8)"))


def test_validation_compares_every_value(export, model_folder, on_the_cpu):
    folder = widen(export(recipe_of("w8a16_g32", lm_head="float"), family="llama").folder)
    report = validate(folder, model_folder("llama"), windows=1, window=24, provider=CPU, threads=1)
    assert report.logits.nonfinite_tokens == 0 and report.logits.kl_mean < 0.01
    assert len(report.layers.linears) == 14 and min(row.own_sqnr_db for row in report.layers.linears) > 35
    assert not report.placement.unfused


def test_validation_tells_another_checkpoint_by_its_bfloat16_tensors(export, captured, on_the_cpu):
    folder = widen(export(recipe_of(), family="llama").folder)
    other = captured("llama")
    other.weights = Shifted(other.weights)
    with pytest.raises(InputError, match="has other values"):
        validate(folder, other, windows=1, window=8, provider=CPU)


class Shifted:
    """Weights of which the norms' differ by more than bfloat16 rounds off."""

    def __init__(self, weights):
        self._weights = weights

    def load(self, name):
        tensor = self._weights.load(name)
        return tensor * 1.1 if tensor.dim() == 1 else tensor

    def __getattr__(self, name):
        return getattr(self._weights, name)


def test_onnxruntime_genai_writes_the_same_tokens(export):
    og = pytest.importorskip("onnxruntime_genai")
    folder = widen(export(recipe_of(), family="llama").folder)
    write_word_tokenizer(folder)
    genai = folder / "genai_config.json"
    assert "bfloat16" not in genai.read_text()  # it reads the types of the file
    genai.write_text(genai.read_text().replace('{\n            "cuda": {}\n          }', ""))
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=12, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens([5, 6, 7, 11])
    while not generator.is_done():
        generator.generate_next_token()
    found = tuple(map(int, generator.get_sequence(0)[4:]))
    ours = open_decoder(folder, provider=CPU, threads=1).generate([[5, 6, 7, 11]], max_new_tokens=8).tokens[0]
    assert len(found) >= 1 and found == ours[: len(found)]


NARROW = section("lorc", rank=4, factors="int8")

# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ("w8a8_static", "inputs are quantized"), ("w4a8_g128", "inputs are quantized"), ("w4a16_pc", "no groups"),
        ("w8a16_pt", "no groups"), ("w4a16_g32", ""), ("w8a16_g64_asym", ""), ("nf4_dq", ""),
    ],
)  # fmt: skip
def test_schemes_without_a_kernel_are_told_apart(scheme, why):
    plan = [LinearPlan("a", "", (64, 64), None), LinearPlan("b", "", (64, 64), Scheme.parse(scheme))]
    brain, plain, int8_factors = CudaTarget(torch.bfloat16), recipe_of(), recipe_of(lorc=NARROW)
    if not why:
        brain.check(plan, plain)
        with pytest.raises(InputError, match="b: .*int8 factors.*factors: float"):
            brain.check(plan, int8_factors)
        return
    with pytest.raises(InputError, match=f"b: {scheme} has no bfloat16 kernel.*{why}.*dtype float16"):
        brain.check(plan, plain)
    brain.check(plan[:1], int8_factors)
    CudaTarget(torch.float16).check(plan, int8_factors)


@pytest.mark.parametrize("changes", [{"lm_head": "w8a8_dyn"}, {"lorc": NARROW}], ids=str)
def test_what_has_no_kernel_is_refused_before_a_weight_is_read(model_folder, tmp_path, changes):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    weights = folder / "model.safetensors"
    recipe, out = recipe_of(**changes), tmp_path / "out"
    size = weights.stat().st_size
    header = int.from_bytes(weights.read_bytes()[:8], "little") + 8
    with weights.open("r+b") as file:  # NaN, which whoever reads a weight complains of
        file.seek(header)
        file.write(b"\xff" * (size - header))
    with pytest.raises(InputError, match="no bfloat16 kernel"):
        qexport.export(folder, recipe, out_dir=out, target="cuda", dtype="bfloat16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("target", "dtype", "known"), [("cpu", "bfloat16", "float32"), ("cuda", "float32", "float16 or bfloat16")]
)
def test_a_dtype_that_a_target_does_not_have_is_refused(tmp_path, target, dtype, known):
    for call in (qexport.inspect, lambda *args, **options: qexport.export(*args, out_dir=tmp_path / "out", **options)):
        with pytest.raises(InputError, match=f"target {target}: computes in {known} only, not in '{dtype}'"):
            call("no such model", "w4a16_g32", target=target, dtype=dtype)


def test_inspection_refuses_it_too(model_folder):
    assert qexport.inspect(model_folder("llama"), recipe_of(), target="cuda", dtype="bfloat16").linears
    with pytest.raises(InputError, match="no bfloat16 kernel"):
        qexport.inspect(model_folder("llama"), recipe_of("w8a8_dyn"), target="cuda", dtype="bfloat16")


def test_the_cpu_provider_cannot_run_it_and_the_error_says_so(export):
    with pytest.raises(RuntimeProblem, match="bfloat16 kernels for the CPU.*dtype float16"):
        open_decoder(export(recipe_of()).folder, provider=CPU)
