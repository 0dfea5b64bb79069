"""Files of other tools: what is planted in one is named first, whatever its linears are called and however written."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import qexport
from helpers import foreign_files as files
from helpers.breadth import quick
from qexport.capture.folder import capture_folder
from qexport.errors import InputError
from qexport.models.source import open_model
from qexport.validation import load

OPTIONS = {"windows": 1, "window": 48, "greedy": 0}
GATE, UP, DOWN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return files.float_model(tmp_path_factory.mktemp("float") / "llama")


@pytest.fixture(scope="module")
def captured(llama):
    """The float model, read once for all tests."""
    return capture_folder(open_model(llama))


@pytest.fixture(scope="module")
def built(llama, tmp_path_factory):
    pytest.importorskip("onnxruntime_genai")
    return files.by_the_builder(llama, tmp_path_factory.mktemp("built") / "int4")


def tensor(layer: int, linear: str, what: str) -> str:
    return f"model.layers.{layer}.{linear}.MatMul.weight_{what}"


def scaled(model):
    files.edit(model, tensor(1, UP, "scales"), lambda scales: scales * np.float32(1.3))


def rows_scaled(model):
    """The rows of k in the packed product."""

    def change(scales):
        found = scales.reshape(128, -1).copy()
        found[64:96] *= np.float32(1.3)
        return found.reshape(scales.shape)

    files.edit(model, tensor(2, "attn.qkv_proj", "scales"), change)


def swapped(model):
    for what in ("Q4", "scales"):
        files.swap(model, tensor(0, DOWN, what), tensor(2, DOWN, what))


def swapped_and_nameless(model):
    swapped(model)
    files.without_names(model)


def shifted(model):
    node = next(node for node in model.graph.node if node.name == "/model/layers.1/attn/o_proj/MatMul_Q4")
    model.graph.initializer.append(numpy_helper.from_array(np.full((64, 1), 0x77, np.uint8), "zeros"))
    node.input.append("zeros")


def garbage(model):
    files.edit(
        model,
        tensor(0, GATE, "Q4"),
        lambda codes: np.random.default_rng(0).permutation(codes.ravel()).reshape(codes.shape),
    )


def gain(model):
    files.edit(model, "model.layers.1.input_layernorm.weight", lambda gains: gains * np.float32(1.5))


FAULTS = {
    "scales": (scaled, "model.layers.1.mlp.up_proj: its weight is 1.3 times the float one"),
    "rows": (rows_scaled, "model.layers.2.self_attn.k_proj: its weight is 1.3 times the float one"),
    "swapped": (swapped, "mlp.down_proj: its weight is that of model.layers."),
    "nameless": (swapped_and_nameless, "mlp.down_proj: its weight is that of model.layers."),
    "zero point": (shifted, "model.layers.1.self_attn.o_proj: its weight is 1.0 steps too large"),
    "garbage": (garbage, "model.layers.0.mlp.gate_proj: its weight is not the float one"),
    "gain": (gain, "model.layers.1.input_layernorm.weight: it is 1.5 times the float model's"),
}  # fmt: skip


@pytest.mark.by_default("rows", "zero point")
@pytest.mark.parametrize("kind", quick(("rows", "nameless", "zero point", "gain"), among=FAULTS))
def test_planted_fault_is_named_first(kind, captured, built, tmp_path):
    plant, said = FAULTS[kind]
    report = qexport.validate(files.changed(built, tmp_path / kind, plant), captured, **OPTIONS)
    assert said in report.problems[0]
    assert not any(problem for problem in report.problems[1:] if "its weight" in problem) or kind in (
        "swapped",
        "nameless",
    )


def test_good_file_has_every_linear_and_no_problem(llama, built, tmp_path, run):
    code, out, _ = run("validate", built, "--reference", llama, "--out", tmp_path, "--windows", 2, "--window", 48)
    assert code == 0 and "written by onnxruntime-genai" in out and not list(built.glob("report*"))
    report = load(tmp_path)
    assert report.problems == () and report.foreign.missing == ()
    assert report.foreign.matched == {"values": 22, "names": 0, "order": 0}
    assert {row.scheme for row in report.layers.linears} == {"w4a16_g32"}
    assert {row.kernel for row in report.layers.linears} == {"MatMulNBits"}
    assert [row.name for row in report.layers.blocks][1:] == [f"model.layers.{i}" for i in range(files.LAYERS)]
    assert min(row.own_sqnr_db for row in report.layers.blocks[1:]) > 10
    assert report.logits.kl_mean < 0.2 and report.greedy is not None
    rounded = [row for row in report.foreign.weights if row.name != "lm_head"]
    assert all(abs(row.sqnr_db - row.nearest_db) < 0.5 and row.unexplained < 0.01 for row in rounded)
    code, out, _ = run("report", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert code == 0 and page.count("model.layers.1.mlp.up_proj") > 1
    assert "qexport validate model.onnx" in page and "qexport export" not in page


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["torch.onnx", "mobius", "nncf", "olive", "modelopt"])
def test_files_of_other_tools(llama, captured, tmp_path, tool):
    """Every linear is found by its values, the float file is lossless, and a scale that is off is named first."""
    pytest.importorskip({"torch.onnx": "onnxscript"}.get(tool, tool))
    if tool == "mobius":
        made = files.by_mobius(llama, tmp_path / "mobius")
    else:
        made = files.by_torch(llama, tmp_path / "torch", 21 if tool == "modelopt" else None)
    if tool not in ("torch.onnx", "mobius"):
        by = {"nncf": files.by_nncf, "olive": files.by_olive, "modelopt": files.by_modelopt}[tool]
        made = by(made / "model.onnx", tmp_path / tool)
    report = qexport.validate(made, captured, **OPTIONS)
    assert report.foreign.missing == () and report.foreign.matched == {"values": 22, "names": 0, "order": 0}
    # NNCF keeps the head in 8 bits, one scale for each token, which no kernel takes.
    assert [problem[:17] for problem in report.problems] == (["lm_head not fused"] if tool == "nncf" else [])
    if tool in ("torch.onnx", "mobius"):
        assert report.logits.kl_mean < 1e-9
        return
    assert 1e-4 < report.logits.kl_mean < 0.5

    def off(model):
        products = [node for node in model.graph.node if node.op_type in ("MatMulNBits", "DequantizeLinear")]
        scales = products[7 + 5].input[2 if products[0].op_type == "MatMulNBits" else 1]
        files.edit(model, scales, lambda scales: scales * np.float32(1.3))  # q, k, v, o, gate, up, down

    report = qexport.validate(files.changed(made, tmp_path / "fault", off), captured, **OPTIONS)
    assert "model.layers.1.mlp.up_proj: its weight is 1.3 times the float one" in report.problems[0]


def test_other_names_of_nodes_and_ports_change_nothing(captured, built, tmp_path):
    def change(model):
        files.without_names(model)
        files.renamed_ports(model)

    plain = qexport.validate(built, captured, out=tmp_path / "plain", **OPTIONS)
    other = qexport.validate(files.changed(built, tmp_path / "other", change) / "model.onnx", captured, **OPTIONS)
    assert other.foreign.matched == plain.foreign.matched
    assert other.logits == plain.logits and other.problems == ()
    assert [(r.name, r.own_sqnr_db) for r in other.layers.linears] == [
        (r.name, r.own_sqnr_db) for r in plain.layers.linears
    ]


@pytest.mark.slow
def test_linear_that_reads_another_value_is_named_first(tmp_path):
    """With as many features as tokens the builder takes the wrong value for the logits' input."""
    model = files.float_model(tmp_path / "float", inner=128)
    report = qexport.validate(files.by_the_builder(model, tmp_path / "int4"), model, **OPTIONS)
    assert report.problems[0].startswith("lm_head: it does not read what the float model reads")


@pytest.mark.slow
def test_smoothed_integer_products_are_told_from_faults(llama, captured, tmp_path):
    """Weights with factors of smoothing, inputs rounded by token with a scale that is multiplied back behind."""
    made = qexport.export(llama, "w8a8_dyn", out_dir=tmp_path / "made").folder
    (made / "manifest.json").unlink()
    report = qexport.validate(made, captured, **OPTIONS)
    assert report.problems == () and report.foreign.matched["values"] == 22
    assert {row.scheme for row in report.layers.linears} == {"w8a8_dyn", "float"}
    assert min(row.own_sqnr_db for row in report.layers.linears if row.scheme != "float") > 30
    assert any(row.factors for row in report.foreign.weights)


def test_settings_that_nobody_made_and_slow_kernels_are_told(captured, built, tmp_path):
    def change(model):
        for node in model.graph.node:
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend(kept)

    report = qexport.validate(files.changed(built, tmp_path / "unset", change), captured, **OPTIONS)
    assert any(note.startswith("accuracy_level is not set for model.layers.0") for note in report.foreign.notes)


def test_dequantized_weights_that_do_not_fuse_say_why(captured, built, tmp_path):
    """One weight as codes behind a DequantizeLinear, [N, K] and turned: ONNX Runtime leaves that alone."""

    def change(model):
        graph = model.graph
        name = "/model/layers.1/mlp/down_proj/MatMul_Q4"
        index, node = next((i, node) for i, node in enumerate(graph.node) if node.name == name)
        codes, scales = (
            numpy_helper.to_array(next(t for t in graph.initializer if t.name == n)) for n in node.input[1:3]
        )
        packed = codes.reshape(64, -1)
        nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(64, 96).astype(np.int8) - 8
        graph.initializer.extend([
            helper.make_tensor("codes", TensorProto.INT4, [64, 96], nibbles.ravel().tolist()),
            numpy_helper.from_array(scales.reshape(64, 3), "scales"),
        ])  # fmt: skip
        made = [
            helper.make_node("DequantizeLinear", ["codes", "scales"], ["dq"], axis=1, block_size=32),
            helper.make_node("Transpose", ["dq"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", [node.input[0], "turned"], list(node.output), "/layers.1/down_proj"),
        ]
        nodes = [*graph.node[:index], *made, *graph.node[index + 1 :]]
        nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del graph.node[:]
        graph.node.extend(nodes)

    report = qexport.validate(files.changed(built, tmp_path / "turned", change), captured, **OPTIONS)
    assert report.problems == (
        "model.layers.1.mlp.down_proj not fused, so that its codes become float again at every run: a Transpose stands "
        "between its DequantizeLinear and the product",
    )
    row = next(row for row in report.layers.linears if row.name == "model.layers.1.mlp.down_proj")
    assert row.scheme == "w4a16_g32" and row.kernel in ("MatMul", "Gemm", "FusedMatMul") and row.own_sqnr_db > 15


def test_bad_input_is_one_sentence(llama, built, tmp_path, run):
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    torch.manual_seed(5)
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig.from_pretrained(llama)).save_pretrained(other)
    (tmp_path / "two").mkdir()
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / "two" / name).write_bytes(b"")
    bare = tmp_path / "bare"
    shutil.copytree(built, bare, ignore=shutil.ignore_patterns("*.data"))
    for place, reference, said in (
        (built, other, "of its 22 linears have weights like those here"),
        (tmp_path / "two", llama, "has 2 ONNX files: a.onnx, b.onnx"),
        (tmp_path / "two" / "a.onnx", llama, "ONNX"),
        (bare, llama, "is missing, and the model has its tensors there"),
    ):
        code, out, err = run(
            "validate", place, "--reference", reference, "--windows", 1, "--window", 16, "--out", tmp_path
        )
        assert code == 2 and said in err.replace("\n", " ") and "Traceback" not in err
    with pytest.raises(InputError, match="only for exports of qexport"):
        qexport.validate(built, llama, sensitivity=True, out=tmp_path)
