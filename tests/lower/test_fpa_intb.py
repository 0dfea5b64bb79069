"""Which linears have the shape for CUDA's fast MatMulNBits: the rule, the kernels that a session launches, the reports.

Kernels are seen on stand-in CUDA libraries, which note the name of every launch: what is chosen, not what is computed.
"""

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_node, make_tensor

import qexport
from helpers.cuda_placement.models import assert_decoder_on_cuda, model, tensor, value
from helpers.cuda_placement.probe import PlacementError
from helpers.random_decoders import save_model
from qexport.api.inspecting import inspect
from qexport.cli.printers.export import export_summary, print_export
from qexport.cli.printers.inspect import print_inspection
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.targets.kernels.fpa_intb import ENTRY, Product, has_no_kernel, why_not, why_slow

ON = {ENTRY: "1"}
DTYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# More rows than the kernel for a matrix and a vector takes.
PROMPT = {"batch_size": 1, "sequence_length": 32, "past_sequence_length": 0, "total_sequence_length": 32}
TOKEN = {"batch_size": 1, "sequence_length": 1}
CHOSEN = [
    Product(4, 32, True, (64, 64)), Product(4, 32, True, (192, 256)), Product(8, 32, True, (32, 128)),
    Product(8, 32, True, (96, 192)), Product(2, 64, True, (128, 64)), Product(2, 64, True, (256, 192)),
]  # fmt: skip
NOT_CHOSEN = {
    Product(4, 32, False, (256, 256)): "has zero points",
    Product(4, 16, True, (256, 256)): "blocks of 16, not 32",
    Product(8, 64, True, (256, 256)): "blocks of 64, not 32",
    Product(2, 32, True, (256, 256)): "blocks of 32, not 64",
    Product(4, 32, True, (96, 256)): "96 output features, not a multiple of 64",
    Product(8, 32, True, (48, 256)): "48 output features, not a multiple of 32",
    Product(2, 64, True, (192, 256)): "192 output features, not a multiple of 128",
    Product(4, 32, True, (256, 240)): "240 input features, not a multiple of 32",
}
FAILS = [Product(4, 32, True, (256, 96)), Product(8, 32, True, (256, 160)), Product(4, 32, True, (64, 32))]


def matmul_nbits(products, bias=False, dtype=TensorProto.FLOAT16):
    """A model of one MatMulNBits for each product, on inputs of their own."""

    def ones(name, *shape):
        return make_tensor(name, dtype, shape, np.ones(math.prod(shape)))

    nodes, inputs, outputs, constants = [], [], [], []
    for i, product in enumerate(products):
        (n, k), blocks = product.shape, -(-product.shape[1] // product.block_size)
        names = [f"x{i}", f"w{i}", f"scale{i}"]
        constants.append(tensor(f"w{i}", np.zeros((n, blocks, product.block_size * product.bits // 8)), np.uint8))
        constants.append(ones(f"scale{i}", n, blocks))
        if not product.symmetric:
            names.append(f"zeros{i}")
            constants.append(tensor(f"zeros{i}", np.zeros((n, -(-blocks * product.bits // 8))), np.uint8))
        if bias:
            names += ["", "", f"bias{i}"]
            constants.append(ones(f"bias{i}", n))
        nodes.append(make_node("MatMulNBits", names, [f"y{i}"], domain="com.microsoft", K=k, N=n, bits=product.bits,
                               block_size=product.block_size))  # fmt: skip
        inputs.append(value(f"x{i}", dtype, "batch_size", "sequence_length", k))
        outputs.append(value(f"y{i}", dtype, "batch_size", "sequence_length", n))
    return model(nodes, inputs, outputs, constants)


def fast(launches):
    """How many of the launches are the kernel's, for a matrix (CUTLASS) or a vector; each product is one."""
    return sum("GemmFpAIntB" in name or "fpA_intB_gemv" in name for name in launches)


@pytest.fixture
def place(cuda_placement, tmp_path):
    def place_model(built, entries, dims):
        onnx.save(built, tmp_path / "model.onnx")
        return cuda_placement(tmp_path / "model.onnx", entries, dims=dims)

    return place_model


@pytest.mark.each_value_once
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dims", [TOKEN, PROMPT], ids=["token", "prompt"])
def test_the_kernel_takes_what_the_rule_says(place, dims, dtype):
    assert [why_not(product) for product in CHOSEN] == [""] * len(CHOSEN)
    assert not any(map(has_no_kernel, CHOSEN))
    assert fast(place(matmul_nbits(CHOSEN, dtype=dtype), ON, dims)["launches"]) == len(CHOSEN)
    assert fast(place(matmul_nbits(CHOSEN, dtype=dtype), {}, dims)["launches"]) == 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_another_kernel_takes_the_rest(place, dtype):
    assert [why_not(product) for product in NOT_CHOSEN] == list(NOT_CHOSEN.values())
    assert not any(map(has_no_kernel, NOT_CHOSEN))
    launches = place(matmul_nbits(NOT_CHOSEN, dtype=dtype), ON, PROMPT)["launches"]
    assert len(launches) >= len(NOT_CHOSEN) and fast(launches) == 0


def test_a_bias_inside_the_operator_rules_it_out(place):
    assert fast(place(matmul_nbits(CHOSEN, bias=True), ON, PROMPT)["launches"]) == 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("product", FAILS, ids=str)
def test_a_session_fails_on_a_prompt_where_the_kernel_is_chosen_and_there_is_none(place, product, dtype):
    assert has_no_kernel(product) and "not a multiple of 64" in why_not(product)
    with pytest.raises(PlacementError, match="No valid fpA_intB MatMulNBits tactic"):
        place(matmul_nbits([product], dtype=dtype), ON, PROMPT)


def test_turned_off_no_product_fails(place):
    assert fast(place(matmul_nbits(FAILS), {ENTRY: "0"}, PROMPT)["launches"]) == 0


def test_one_product_without_a_kernel_keeps_it_from_all():
    found = why_slow({"fine": CHOSEN[0], "stuck": FAILS[0], "zeros": Product(4, 32, False, (64, 64))})
    assert found["fine"] == "cannot be turned on for this file, where stuck would fail"
    assert found["stuck"] == "96 input features, not a multiple of 64" and found["zeros"] == "has zero points"
    assert why_slow({}) == {}


# ---- exports --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose products are all of the right widths, though k and v alone, and gate and up, are not."""
    return save_model("llama", tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=192, head_dim=32,
                      num_key_value_heads=1, num_hidden_layers=1)  # fmt: skip


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A model whose down projection reads 96 features."""
    return save_model("llama", tmp_path_factory.mktemp("narrow"), num_hidden_layers=1)


def recipe_of(scheme, **more):
    calibration = CalibrationSpec(source="random", samples=2, sequence_length=8)
    return Recipe(scheme=scheme, lm_head=scheme, calibration=calibration, weights={"method": "rtn"}, **more)


def export(model_folder, recipe, tmp_path, dtype=None):
    return qexport.export(model_folder, recipe, out_dir=tmp_path / "out", target="cuda", dtype=dtype)


@pytest.mark.by_default("w4a16_g32-None")
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [("w4a16_g32", None), ("w8a16_g32", "bfloat16"), *(
        pytest.param(scheme, dtype, marks=pytest.mark.slow)
        for scheme, dtype in (("w4a16_g32", "bfloat16"), ("w4a16_pc", None), ("w4a8_g32", None))
    )],
)
def test_every_product_of_an_export_is_launched_as_the_fast_kernel(wide, cuda_placement, tmp_path, scheme, dtype):
    exported = export(wide, recipe_of(scheme), tmp_path, dtype)
    linears = exported.manifest.linears
    assert [linear.fast for linear in linears] == [True] * 8 and not any(linear.slow for linear in linears)
    assert linears[1].shape == (32, 128)  # too few columns but for those of q and v beside them
    path, entries = exported.folder / "model.onnx", exported.manifest.session
    placed = cuda_placement(path, entries | ON, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    assert fast(placed["launches"]) == len({linear.node for linear in linears}) == 5
    assert fast(cuda_placement(path, entries, dims=PROMPT)["launches"]) == 0  # as it is slower


def test_an_export_whose_widths_have_no_kernel_runs_without_it(narrow, cuda_placement, tmp_path, capsys):
    exported = export(narrow, recipe_of("w4a16_g32"), tmp_path)
    found = {linear.name.rpartition(".")[2]: linear.slow for linear in exported.manifest.linears}
    assert found["down_proj"] == "96 input features, not a multiple of 64"
    assert found["q_proj"] == "cannot be turned on for this file, where model.layers.0.mlp.down_proj would fail"
    path = exported.folder / "model.onnx"
    with pytest.raises(PlacementError, match="No valid fpA_intB MatMulNBits tactic"):
        cuda_placement(path, exported.manifest.session | ON, dims=PROMPT)
    placed = cuda_placement(path, exported.manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    assert fast(placed["launches"]) == 0
    print_export(exported)
    assert "fits 0 of 8 linears; 7: cannot be turned on for this file" in capsys.readouterr().out
    assert export_summary(exported)["fast_linears"] == 0


RECIPES = {
    "w2a16_g64": recipe_of("w2a16_g64"),
    "w4a16_pt": recipe_of("w4a16_pt"),
    "nf4": recipe_of("nf4"),
    "some": recipe_of(
        "w4a16_g32", lorc={"rank": 4}, overrides=[
            {"match": "*.k_proj", "scheme": "w4a16_g64"}, {"match": "*.o_proj", "scheme": "w8a8_dyn"},
            {"match": "*.up_proj", "scheme": "w4a16_g32_asym"},
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_inspect_foretells_what_the_manifest_says(wide, tmp_path, recipe):
    linears = export(wide, recipe, tmp_path).manifest.linears
    told = {linear.name: linear.slow for linear in linears if linear.fast is not None}
    assert inspect(wide, recipe, target="cuda").slow == told
    assert {linear.name for linear in linears if linear.kernel == "MatMulNBits"} == told.keys()


def test_inspect_foretells_what_turns_it_off(narrow, tmp_path):
    linears = export(narrow, recipe_of("w4a16_pc"), tmp_path).manifest.linears
    assert inspect(narrow, recipe_of("w4a16_pc"), target="cuda").slow == {e.name: e.slow for e in linears}


def test_inspect_shows_the_reason(wide, capsys):
    print_inspection(inspect(wide, recipe_of("w4a16_g64"), target="cuda"), all_layers=False)
    out = capsys.readouterr().out
    assert out.count("blocks of 64, not 32") == 9 and "fits 0 of 8 linears; 8: blocks of 64, not 32" in out


def test_only_cuda_has_the_choice(wide, tmp_path, capsys):
    exported = qexport.export(wide, recipe_of("w4a16_g32"), out_dir=tmp_path / "out", target="cpu")
    assert {linear.fast for linear in exported.manifest.linears} == {None}
    print_inspection(inspect(wide, recipe_of("w4a16_g32"), target="cpu"), all_layers=False)
    print_export(exported)
    assert "fpA_intB" not in capsys.readouterr().out
