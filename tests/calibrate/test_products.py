"""`calibration.products`: blocks and Hessians in bfloat16 products, and nothing else."""

import json

import pytest
import torch

from helpers import exports
from qexport.api.stages import capturing
from qexport.calibrate import block_activations
from qexport.device import products_in
from qexport.errors import RecipeError
from qexport.quant import gptq
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section

CALIBRATION = CalibrationSpec(source="random", samples=4, sequence_length=16, batch_size=2)


def precision():
    return torch.get_float32_matmul_precision()


def test_products_are_as_before_behind_it():
    before = precision()
    with products_in("float32"):
        assert precision() == before
    with pytest.raises(ZeroDivisionError), products_in("bfloat16"):
        assert precision() == "medium"
        raise ZeroDivisionError
    assert precision() == before


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="the processor has no products of bfloat16")
def test_factors_keep_eight_bits_and_sums_more():
    a, b = torch.randn(64, 256), torch.randn(256, 64)
    with products_in("bfloat16"):
        rounded = a @ b
    exact = a.double() @ b.double()
    of_factors = a.bfloat16().double() @ b.bfloat16().double()
    assert (rounded - exact).abs().max() > 1e-3
    assert (rounded - of_factors).abs().max() < 1e-4


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="the processor has no products of bfloat16")
def test_attention_reads_bfloat16_only_there():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 16, 8, generator=random) for heads in (4, 2, 2))
    past, mask = torch.zeros(2, 2, 0, 8), torch.ops.qexport.causal_mask(torch.ones(2, 16), 0, 0)
    plain, *present = torch.ops.qexport.cached_attention(q, k, v, past, past, mask, 0.35, 0.0)
    with products_in("bfloat16"):
        rounded, *kept = torch.ops.qexport.cached_attention(q, k, v, past, past, mask, 0.35, 0.0)
    assert 1e-4 < (rounded - plain).abs().max() < 3e-2 and rounded.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(present, kept, strict=True))


def test_blocks_and_hessians_take_it_and_rounding_does_not(captured, model_folder, tmp_path, monkeypatch):
    seen = {}

    def spy(module, name, what):
        original = getattr(module, name)

        def spied(*args, **kwargs):
            seen.setdefault(what, set()).add(precision())
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, spied)

    monkeypatch.setattr(capturing, "capture_model", lambda *_, **__: captured("llama"))
    spy(block_activations.Executor, "__call__", "blocks")
    spy(block_activations._StatisticsInterpreter, "run_node", "statistics")
    spy(gptq, "_eliminate", "rounding")
    made = {}
    for products in ("float32", "bfloat16"):
        seen.clear()
        calibration = CALIBRATION.model_copy(update={"products": products})
        recipe = Recipe(scheme="w8a16_g32", weights=section("weights", method="gptq"), calibration=calibration)
        exports.exporting.export(model_folder("llama"), recipe, out_dir=tmp_path / products)
        made[products] = json.loads((tmp_path / products / "report.json").read_text())["export"]["blocks"]
        assert seen["rounding"] == {"highest"}
        assert seen["statistics"] == ({"medium"} if products == "bfloat16" else {"highest"})
        assert "medium" in seen["blocks"] if products == "bfloat16" else seen["blocks"] == {"highest"}
    pairs = [(one["sqnr_db"], other["sqnr_db"]) for one, other in zip(*made.values(), strict=True)]
    assert any(exact is not None for exact, _ in pairs)
    assert all(exact is rounded is None or abs(exact - rounded) < 3 for exact, rounded in pairs), pairs


def test_other_products_are_refused():
    with pytest.raises(RecipeError, match="float32.*bfloat16"):
        CalibrationSpec(products="int8")
