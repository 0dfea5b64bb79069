"""Models that are quantized already keep their codes: in the file they are those of the checkpoint, and its logits are
those of the weights that they stand for."""

import json
import shutil

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

import qexport
from helpers import coded_checkpoints as packers
from helpers.breadth import quick
from helpers.random_decoders import save_model
from helpers.random_modules import save_encoder
from helpers.tokenizer_files import write_word_tokenizer
from qexport.errors import CaptureError, InputError
from qexport.passes.weights.as_stored import KeepCodes
from qexport.recipe.recipe import Recipe

EXACT = Recipe.load("as_stored").model_copy(update={"accuracy_level": 1})
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


class Encoder:
    """Encodes every linear but one at random, and remembers what it made by the linear's name.

    Args:
        pack: from codes, scales, zero points and groups to tensors.
        options: of `random_codes`.
    """

    def __init__(self, pack, bits=4, group=32, **options):
        self.pack, self.bits, self.group, self.options = pack, bits, group, options
        self.made = {}

    def __call__(self, path, shape):
        if path.endswith("layers.1.self_attn.o_proj"):
            return None
        seed = len(path) if "q_proj" in path or "k_proj" in path or "v_proj" in path else len(self.made)
        made = packers.random_codes(shape, self.bits, self.group, seed=seed, **self.options)
        if self.options.get("act_order"):  # linears of one input take it in one order
            made = (*made[:3], packers.random_codes((1, shape[1]), 4, self.group, seed=shape[1], act_order=True)[3])
        self.made[path] = made
        return self.pack(*made), packers.dequantized(*made)


def gptq(bits=4, version=1):
    return lambda *made: packers.gptq(*made, bits, version=version)


DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = DYNAMIC | {"strategy": "tensor", "dynamic": False}


def compressed(bits=4, symmetric=True, pack=True, **more):
    return lambda *made: packers.compressed(*made, bits, symmetric=symmetric, pack=pack) | {
        end: tensor.clone() for end, tensor in more.items()
    }


CASES = {  # how it is packed, the config, what linears become
    "gptq": (Encoder(gptq()), GPTQ, "w4a16_g32"),
    "gptq act-order": (
        Encoder(gptq(version=2), symmetric=False, act_order=True),
        GPTQ | {"sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"}, "w4a16_g32_asym",
    ),
    "gptq 8 bits": (Encoder(gptq(8), bits=8), GPTQ | {"bits": 8}, "w8a16_g32"),
    "gptq 3 bits": (Encoder(gptq(3), bits=3), GPTQ | {"bits": 3}, "w3a16_g32"),
    "compressed 4 bits": (
        Encoder(compressed(symmetric=False), symmetric=False),
        packers.compressed_said("pack-quantized", 4, False, 32), "w4a16_g32_asym",
    ),
    "awq": (Encoder(lambda *made: packers.awq(*made[:3]), symmetric=False), AWQ, "w4a16_g32_asym"),
}  # fmt: skip



def nf4(path, shape):
    """A linear in blocks of 32: the widths here are 64 and 96."""
    codes = packers.random_codes(shape, 4, 32, seed=len(path))[0]
    absmax = torch.rand(shape[0] * shape[1] // 32, generator=torch.Generator().manual_seed(len(path))) / 4
    table = torch.tensor(packers.TABLES["nf4"], dtype=torch.float64)
    spread = absmax.double().repeat_interleave(32).view(shape)
    return packers.bitsandbytes(codes, absmax, "nf4", 32), table[codes] * spread


def test_tables_in_the_file(tmp_path):
    """MatMulBnb4 has the bytes of the checkpoint, as bitsandbytes packs them."""
    folder = save_model("llama", tmp_path / "model")
    twin = packers.coded(folder, nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    result = qexport.export(folder, EXACT, out_dir=tmp_path / "out")
    stored, model = load_file(folder / "model.safetensors"), onnx.load(result.folder / "model.onnx")
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert len(result.manifest.linears) == 15
    for entry in result.manifest.linears:
        node = next(n for n in model.graph.node if n.name == entry.node)
        assert node.op_type == "MatMulBnb4"
        assert torch.equal(torch.tensor(tensors[node.input[1]]), stored[f"{entry.name}.weight"].flatten())
        assert torch.equal(torch.tensor(tensors[node.input[2]]), stored[f"{entry.name}.weight.absmax"])
    report = qexport.validate(result.folder, twin, windows=2, window=32, greedy=0)
    assert report.logits.kl_mean < 1e-9


INTEGER = {  # the same of integer products
    "dynamic": (
        Encoder(compressed(8, pack=False), bits=8, group=1024),
        packers.compressed_said("int-quantized", 8, True, inputs=DYNAMIC), "w8a8_dyn",
    ),
    "static": (
        Encoder(compressed(8, pack=False, **{".input_scale": torch.tensor([0.037])}), bits=8, group=1024),
        packers.compressed_said("int-quantized", 8, True, inputs=STATIC), "w8a8_static",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(case): the folder of codes, that of the weights they stand for, and what was made."""
    made = {}

    def make(case):
        if case not in made:
            encoder, said, _ = (CASES | INTEGER)[case]
            folder = save_model("llama", tmp_path_factory.mktemp("coded") / "model")
            write_word_tokenizer(folder)
            made[case] = folder, packers.coded(folder, encoder, said), encoder.made
        return made[case]

    return make


# Of codes in planes.
OPERATORS = {
    "Cast": lambda x: x, "Gather": lambda x, index: x[index], "Reshape": lambda x, shape: x.reshape(shape),
    "BitwiseOr": lambda x, y: x | y,
}  # fmt: skip


def made_at_load(graph, name):
    """A tensor, or what ONNX Runtime makes of others when it loads the file."""
    found = next((t for t in graph.initializer if t.name == name), None)
    if found is not None:
        return numpy_helper.to_array(found)
    node = next(node for node in graph.node if name in node.output)
    return OPERATORS[node.op_type](*(made_at_load(graph, part) for part in node.input))


def rows_in_file(folder, entry):
    """The packed codes, scales and zero points of a linear in MatMulNBits: uint8 [N, blocks, bytes], float [N, blocks],
    uint8 [N, bytes] or None."""
    model = onnx.load(folder / "model.onnx")
    node = next(n for n in model.graph.node if n.name == entry.node)
    packed, scales, *zeros = [torch.from_numpy(made_at_load(model.graph, n).copy()) for n in node.input[1:] if n]
    rows = slice(*(entry.columns or (0, entry.shape[0])))
    scales = scales.view(len(packed), -1)
    return packed[rows], scales[rows], zeros[0].view(len(packed), -1)[rows] if zeros else None


def unpacked(packed, bits, count):
    """Codes of bytes, one by one from the lowest bits; those of 3 bits lie in 4."""
    flat = packed.reshape(len(packed), -1).long()
    width = 4 if bits == 3 else bits
    return torch.stack([(flat[:, i * width // 8] >> (i * width % 8)) & ((1 << width) - 1) for i in range(count)], 1)


@pytest.mark.by_default("gptq act-order")
@pytest.mark.parametrize("case", quick(("gptq act-order", "gptq 3 bits", "awq"), among=CASES))
def test_codes_in_the_file(checkpoint, tmp_path, case):
    folder, twin, made = checkpoint(case)
    result = qexport.export(folder, EXACT, out_dir=tmp_path / "out")
    bits, entries = CASES[case][0].bits, {entry.name: entry for entry in result.manifest.linears}
    assert entries.keys() == made.keys()
    assert {entry.scheme for entry in entries.values()} == {CASES[case][2]}
    for name, (codes, scales, zeros, group_of) in made.items():
        n, k = codes.shape
        order = torch.argsort(group_of, stable=True)
        if (rows := entries[name].makes_order) is not None:  # rows in the order in which the next linear reads them
            codes, scales, zeros = codes[rows], scales[rows], zeros[rows]
        packed, in_scales, in_zeros = rows_in_file(result.folder, entries[name])
        middle = 8 if bits in (3, 4) else 128
        found = unpacked(packed, bits, k)
        if in_zeros is None:
            assert torch.equal(found - middle, (codes - zeros[:, :1])[:, order])
        else:
            assert torch.equal(found, codes[:, order])
            assert torch.equal(unpacked(in_zeros, bits, in_scales.shape[1]), zeros)
        assert torch.equal(in_scales, scales.float())
    float_linears = {p.name for p in result.plan if p.scheme is None}
    assert float_linears == {"model.layers.1.self_attn.o_proj", *({"lm_head"} - made.keys())}
    assert "each" not in result.reference.why_not and result.reference.weights > 10
    assert "quantization_config" not in json.loads((result.folder / "config.json").read_text())

    report = qexport.validate(result.folder, twin, windows=2, window=32, greedy=0)  # a float model of its own reader
    assert report.logits.kl_mean < 1e-9
    assert report.layers is None or all(row.sqnr_db > 90 for row in report.layers.linears)


@pytest.mark.by_default("static")
@pytest.mark.parametrize("case", INTEGER)
def test_integer_products(checkpoint, tmp_path, case):
    """Codes of weights and the scale of a static input are those of the checkpoint; nothing is calibrated."""
    folder, _, made = checkpoint(case)
    result = qexport.export(folder, out_dir=tmp_path / "out")
    assert result.calibration == "none needed"
    assert {entry.scheme for entry in result.manifest.linears} == {INTEGER[case][2]}
    assert {entry.kernel for entry in result.manifest.linears} == {"MatMulIntegerToFloat"}
    model = onnx.load(result.folder / "model.onnx")
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for entry in result.manifest.linears:
        codes, scales, _, _ = made[entry.name]
        product = next(n for n in model.graph.node if n.name == entry.node)
        dequantized = next(n for n in model.graph.node if n.output[0] == product.input[1])
        columns = slice(*(entry.columns or (0, entry.shape[0])))
        assert torch.equal(torch.tensor(tensors[dequantized.input[0]]).long()[:, columns].t(), codes - 128)
        assert torch.equal(torch.tensor(tensors[dequantized.input[1]])[columns], scales.float().flatten())
    given = [value for name, value in tensors.items() if name.endswith(".input_scale")]
    assert [float(value) for value in given] == [pytest.approx(0.037)] * (8 if case == "static" else 0)


def test_the_command_line(checkpoint, run, tmp_path):
    folder, twin, made = checkpoint("gptq act-order")
    code, out, _ = run("inspect", folder)
    assert code == 0
    assert "The checkpoint holds codes (GPTQ, 4 bits in groups of 32, act-order): 14 of 15 linears keep them" in out
    assert "as stored, input features in the order of their groups" in out
    assert "are rounded" not in out
    code, out, _ = run("inspect", folder, "--target", "cuda", "--dtype", "bfloat16")
    assert "the scales of 14 are rounded to bfloat16" in out
    code, out, _ = run("inspect", folder, "--json")
    assert json.loads(out)["recipe"] == "as_stored"
    code, out, _ = run("export", folder, "-o", tmp_path / "out")
    assert code == 0 and "each was compared with the formula of its method" in out
    assert json.loads((tmp_path / "out/report.json").read_text())["export"]["codes"].startswith("the checkpoint holds")
    code, out, _ = run("generate", tmp_path / "out", "--prompt", "w1 w2", "--max-new-tokens", 4, "--temperature", 0)
    assert code == 0 and out


def test_requantized(checkpoint, run, tmp_path):
    """Through float: what is exported is the float twin."""
    folder, twin, _ = checkpoint("gptq")
    code, _, err = run("export", folder, "-o", tmp_path / "out", "--recipe", "w8a16_g32")
    assert code == 2 and "its weights are codes already (GPTQ, 4 bits in groups of 32)" in err
    code, _, err = run("export", twin, "-o", tmp_path / "out", "--requantize", "w8a16_g32")
    assert code == 2 and "its weights are not quantized" in err
    code, _, err = run("export", folder, "-o", tmp_path / "out", "--requantize", "as_stored")
    assert code == 2 and "as_stored keeps the codes" in err
    code, _, err = run("export", folder, "-o", tmp_path / "out", "--requantize", "w8a16_g32", "-r", "w4a16_g32")
    assert code == 2 and "Give one of them" in err
    code, _, _ = run("export", folder, "-o", tmp_path / "out", "--requantize", "w8a16_g32")
    assert code == 0
    qexport.export(twin, "w8a16_g32", out_dir=tmp_path / "twin")
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "twin" / file).read_bytes()


def test_a_wrong_version_of_zero_points_is_found(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("gptq")[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(qexport.QExportError, match="has zero points other than 8"):
        qexport.export(folder, out_dir=tmp_path / "out")


def test_methods_that_change_weights_do_not_go_with_codes():
    with pytest.raises(qexport.QExportError, match="changes weights, whose codes are kept"):
        Recipe(scheme="w4a16_g32", weights={"method": "as_stored"}, lorc={"rank": 4})


def test_for_cuda(checkpoint, tmp_path):
    """float16: the scales of the checkpoint are, too, and the input is read in the order of the codes."""
    folder, _, made = checkpoint("gptq act-order")
    result = qexport.export(folder, out_dir=tmp_path / "out", target="cuda")
    name = "model.layers.0.mlp.down_proj"
    packed, scales, zeros = rows_in_file(result.folder, next(e for e in result.manifest.linears if e.name == name))
    codes, want, zero, group_of = made[name]
    assert torch.equal(unpacked(packed, 4, codes.shape[1]), codes[:, torch.argsort(group_of, stable=True)])
    assert torch.equal(scales, want) and torch.equal(unpacked(zeros, 4, scales.shape[1]), zero)
    model = onnx.load(result.folder / "model.onnx")
    orders = [t.name for t in model.graph.initializer if t.name.endswith(".input_order")]
    assert len(orders) == 3 + 2 + 1, "q, k and v share one, gate and up too, down has none; one o_proj is float"
    assert sum(node.op_type == "Gather" and node.input[1] in orders for node in model.graph.node) == len(orders)


@pytest.mark.parametrize("family", ["mixtral", "bert"])
def test_models_that_transformers_converts_or_reads_whole_are_refused(tmp_path, family):
    folder = save_model("mixtral", tmp_path) if family == "mixtral" else save_encoder("bert", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(tensors) if n.endswith(("w1.weight", "query.weight")))
    made = packers.random_codes(tuple(tensors[name].shape), 4, 32)
    del tensors[name]
    tensors |= {name.removesuffix(".weight") + end: part for end, part in packers.gptq(*made, 4).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": GPTQ}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CaptureError, match=r"its weights are codes \(GPTQ, .* which are only supported for"):
        qexport.inspect(folder)


def test_passes_of_the_caller_do_not_go_with_kept_codes(checkpoint, tmp_path):
    with pytest.raises(InputError, match="as_stored keeps the stored codes, whatever passes do to the float weights"):
        qexport.export(checkpoint("gptq")[0], out_dir=tmp_path / "out", extra_passes=[KeepCodes({})])


def test_layouts_of_one_kernel_are_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("gptq")[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "marlin"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="in the layout marlin of a GPU kernel"):
        qexport.inspect(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "numbers"), [("float", "e4m3"), pytest.param("int", "int", marks=pytest.mark.slow)]
)
def test_scales_of_a_cache_come_along(tmp_path, run, kind, numbers):
    """Keys and values are rounded with the scales of the checkpoint, and nothing is calibrated."""
    said = packers.compressed_said("pack-quantized", 4, True, 32)
    said["kv_cache_scheme"] = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "tensor", "dynamic": False}
    folder = save_model("llama", tmp_path / "model")
    packers.coded(folder, Encoder(compressed()), said)
    tensors = load_file(folder / "model.safetensors")
    scales = {f"model.layers.{i}.self_attn.{k}_scale": 0.01 + i / 100 + (k == "v") / 1000 for i in (0, 1) for k in "kv"}
    tensors |= {name: torch.tensor([value]) for name, value in scales.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = run("inspect", folder)
    assert code == 0 and "The export needs no calibration data" in out and "left out" not in out

    result = qexport.export(folder, out_dir=tmp_path / "out")
    assert result.calibration == "none needed"
    assert result.manifest.settings.get("kv_cache_bits") == (8 if kind == "int" else None)  # CUDA alone keeps e4m3
    found = [numpy_helper.to_array(t) for t in onnx.load(result.folder / "model.onnx").graph.initializer
             if t.name.endswith(("key_scale", "value_scale"))]  # fmt: skip
    assert sorted(float(scale.flat[0]) for scale in found) == pytest.approx(sorted(scales.values()))
    report = qexport.validate(result.folder, folder, windows=1, window=32, greedy=0)
    assert report.logits.kl_mean < 0.1
