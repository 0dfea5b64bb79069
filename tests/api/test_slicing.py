"""The upper bits of an export: what codes become, what files of them hold, and training that makes them good."""

import json

import numpy as np
import onnx
import pytest
import torch

import qexport
from helpers.exports import session_runner
from helpers.runners import captured_runner, load_weights, prompt_feeds, tokens
from qexport.artifact.manifest import load
from qexport.calibrate.tuning import kl_and_gradient
from qexport.errors import InputError, LoweringError, RecipeError
from qexport.quant.formats import IntegerFormat
from qexport.quant.learned_codes import slice_through
from qexport.quant.slicing import slice_codes
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section
from qexport.runtime.session import open_session


@pytest.mark.parametrize("fewer", [4, 2])
@pytest.mark.parametrize("zero", [None, 0, 77, 255])
def test_every_code_becomes_the_nearest_one_of_fewer_bits(fewer, zero):
    codes, step, most = torch.arange(256).to(torch.uint8), 2 ** (8 - fewer), 2**fewer - 1
    found, new = slice_codes(codes, None if zero is None else torch.tensor(zero, dtype=torch.uint8), 8, fewer)
    middle = 2 ** (fewer - 1) if new is None else int(new)
    for code, got in zip(codes.tolist(), found.tolist(), strict=True):
        steps = (code - (128 if zero is None else zero)) / step
        assert got == min(max(middle + int(np.round(steps)), 0), most)
    # In training the same: values in steps of the 8-bit codes, around zero.
    fmt, zeros = IntegerFormat(8, 256, zero is None), None if zero is None else torch.full((1, 1), float(zero))
    given = codes.float().view(1, 1, 256) - (128 if zero is None else 0)
    assert torch.equal(slice_through(given, zeros, fmt, fewer).flatten(), (found.float() - middle) * step)


def recipe(scheme="w8a16_g32", **more):
    return Recipe(
        scheme=scheme, calibration=CalibrationSpec(source="random", samples=4, sequence_length=24, batch_size=2), **more
    )


def weights(folder):
    """By node the float weight that the file's codes stand for, and its bits."""
    model, found = onnx.load(folder / "model.onnx"), {}
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            given = {a.name: a.i for a in node.attribute}
            bits, n, per = given["bits"], given["N"], 8 // given["bits"]

            def spread(t, bits=bits, per=per):
                return (t[..., None] >> np.arange(0, 8, bits)[:per] & (2**bits - 1)).reshape(*t.shape[:-1], -1)

            codes, scale = spread(tensors[node.input[1]].astype(int)), tensors[node.input[2]].reshape(n, -1, 1)
            zero = 2 ** (bits - 1)
            if len(node.input) > 3 and node.input[3]:
                zero = spread(tensors[node.input[3]].reshape(n, -1).astype(int))[:, : codes.shape[1], None]
            found[node.name] = (codes, zero, scale, bits)
    return found


@pytest.mark.by_default("w8a16_g32")
@pytest.mark.parametrize("scheme", ["w8a16_g32", "w8a16_g32_asym"])
def test_a_slice_has_the_upper_bits_of_every_product_and_its_table_stays(export_folder, tmp_path, scheme):
    whole = export_folder("llama", recipe(scheme, lm_head="w8a16_g32", embedding="tied"))
    for bits in (4, 2) if scheme.endswith("asym") else (4,):
        done = qexport.slice_export(whole, bits=bits, out_dir=tmp_path / str(bits))
        before, after, step = weights(whole), weights(done.folder), 2 ** (8 - bits)
        sliced = [name for name in before if after[name][3] == bits]
        assert len(sliced) == done.products > 0 and set(before) == set(after)
        for name in sliced:
            (old, zero, scale, _), (new, around, wide, _) = before[name], after[name]
            assert np.array_equal(wide, scale * step)
            middle = np.broadcast_to(np.clip(np.round(zero / step), 0, 2**bits - 1), new.shape)
            assert np.array_equal(np.broadcast_to(around, new.shape), middle)
            assert np.array_equal(new, np.clip(np.round((old - zero) / step) + around, 0, 2**bits - 1))
        made = load(done.folder)
        size = sum((done.folder / f).stat().st_size for f in ("model.onnx", "model.onnx.data"))
        assert size == done.after == made.bytes["model"] < done.before
        assert sum(v for k, v in made.bytes.items() if k != "model") == size
        entries = [e for e in made.linears if e.scheme.startswith(f"w{bits}")]
        assert len(entries) >= len(sliced) and "the upper" in entries[0].reason
        assert all(check.ok for check in qexport.diagnose(export=done.folder) if "files" in check.name)


@pytest.mark.slow
def test_codes_trained_for_it_have_better_upper_bits(captured, export_folder, tmp_path):
    feeds = prompt_feeds(captured("llama"), tokens(4, 24), torch.ones(4, 24, dtype=torch.int64))
    wanted, kl = captured_runner(load_weights(captured("llama")))(feeds)["logits"], {}
    for method in ("rtn", "matquant"):
        options = {} if method == "rtn" else {"steps": 40, "token_norm_power": 0.0}
        trained = recipe(weights=section("weights", method=method, **options))
        whole = export_folder("llama", trained.with_calibration(samples=24, batch_size=8))
        part = qexport.slice_export(whole, bits=4, out_dir=tmp_path / method).folder
        for name, folder in ((8, whole), (4, part)):
            run = session_runner(open_session(folder, load(folder), threads=1))
            kl[method, name] = kl_and_gradient(wanted, run(feeds)["logits"], None)[0]
    assert kl["matquant", 4] < 0.8 * kl["rtn", 4]
    assert kl["rtn", 8] < kl["matquant", 8] < 0.5 * kl["matquant", 4]


def test_the_command_line(export_folder, run, tmp_path):
    whole = export_folder("llama", recipe(lm_head="w8a16_g32", embedding="tied"))
    code, out, _ = run("slice", whole, "--bits", "4", "-o", tmp_path / "four")
    assert code == 0 and "products in 4 bits" in out and "instead of" in out
    code, out, _ = run("slice", whole, "-o", tmp_path / "two", "--bits", "2", "--json")
    assert code == 0 and json.loads(out)["bits"] == 2
    code, _, err = run("slice", whole, "--bits", "3", "-o", tmp_path / "three")
    assert code == 2 and "a slice cannot have 3 bits" in err and not (tmp_path / "three").exists()
    code, _, err = run("slice", whole, "--bits", "4", "-o", tmp_path / "four")
    assert code == 2 and "--overwrite" in err
    code, _, err = run("slice", tmp_path / "four", "--bits", "2", "-o", tmp_path / "again")
    assert code == 2 and "no products with 8-bit codes" in err and not (tmp_path / "again").exists()


def test_what_cannot_be_sliced_says_why(export_folder, tmp_path):
    with pytest.raises(InputError, match="has other products for prompts"):
        qexport.slice_export(export_folder("llama", recipe(prefill="int8")), bits=4, out_dir=tmp_path / "a")
    with pytest.raises(LoweringError, match="has groups of 16, and the kernel for 2 bits"):
        qexport.slice_export(export_folder("llama", recipe("w8a16_g16")), bits=2, out_dir=tmp_path / "b")
    with pytest.raises(RecipeError, match="matquant has 8-bit codes in groups"):
        recipe("w4a16_g32", weights=section("weights", method="matquant"))
