"""A target defined outside of the package, in this file alone, goes through everything that a target goes through."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

import qexport
from helpers.random_decoders import save_model
from helpers.tokenizer_files import write_word_tokenizer
from qexport.artifact.manifest import CPU
from qexport.errors import InputError, RecipeError
from qexport.graph.edit import finish
from qexport.lower.precision import to_half
from qexport.lower.qdq_patterns import as_own_kernel, kernel_of, linear_products
from qexport.plan.linear_plan import LinearPlan
from qexport.quant.formats import Scheme
from qexport.quant.packing import DEFAULT_BLOCK
from qexport.recipe.recipe import Recipe
from qexport.targets.base import Target, register, target_for, targets
from qexport.targets.cpu import CpuTarget

TEXT = " ".join(f"w{i * i % 97}" for i in range(300))


@register
@dataclass(frozen=True)
class AbacusTarget(Target):
    """The CPU provider in float16, or in float32 when asked: weights in groups, of which 16 are slow, and no more."""

    name: ClassVar[str] = "abacus"
    provider: ClassVar[str] = CPU
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.float32)
    candidates: ClassVar[tuple[str, ...]] = ("w4a16_g32", "w8a16_g32")
    dtype: torch.dtype = dtypes[0]

    def lacks(self, scheme: Scheme, recipe: Recipe) -> tuple[str, str]:
        return ("no kernel: an abacus has no int8 inputs", "Take w4a16_g32") if scheme.activation else ("", "")

    def session(self, products: Sequence[Node] = ()) -> dict[str, str]:
        return {
            "session.qdq_matmulnbits_accuracy_level": "1",
            "session.qdq_matmulnbits_block_size": str(DEFAULT_BLOCK),
            "session.intra_op.allow_spinning": "0",
        }

    def numerics(self, kv_cache_bits: int | None = None) -> dict[str, str]:
        return {"dtype": "beads"}

    def rewrite(self, module: GraphModule, constants: set[str]) -> None:
        for product in linear_products(module.graph):
            as_own_kernel(module, product)
        finish(module)
        if self.dtype != torch.float32:
            to_half(module, constants, self.dtype)

    def kernel(self, product: Node) -> str:
        return kernel_of(product)

    def slow(self, products: Sequence[Node]) -> dict[str, str]:
        return {product.meta["linear"]: "few beads" for product in products}

    def predict_slow(self, graphs: Sequence[Graph], plan: Mapping[str, LinearPlan]) -> dict[str, str]:
        return {name: "few beads" for name, linear in plan.items() if linear.scheme is not None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=1)
    write_word_tokenizer(found, 128)
    return found


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("abacus") / "out"
    qexport.export(folder, "w4a16_g32_rtn", out_dir=place, target="abacus")
    return place


def test_it_is_found_by_its_name_behind_those_of_the_package():
    assert [*targets()] == ["cpu", "cuda", "abacus"]
    assert target_for("abacus", Recipe.load("w4a16_g32_rtn")) == AbacusTarget(torch.float16)


def test_a_name_is_given_once():
    class Other(AbacusTarget):
        pass

    Other.__module__ = "elsewhere"
    with pytest.raises(ValueError, match=f"elsewhere: the target 'abacus' is in {__name__} already"):
        register(Other)
    Other.name = "cuda"
    with pytest.raises(ValueError, match=r"the target 'cuda' is in qexport.targets.cuda already"):
        register(Other)
    assert targets()["abacus"] is AbacusTarget


def test_inspect_foretells_its_bytes_and_its_slow_linears(folder, out):
    found = qexport.inspect(folder, "w4a16_g32_rtn", target="abacus")
    manifest = json.loads((out / "manifest.json").read_text())
    assert found.bytes["float"] == 2 * found.parameters
    assert found.slow == {entry["name"]: entry["slow"] for entry in manifest["linears"]}
    assert set(found.slow.values()) == {"few beads"}


def test_the_manifest_says_what_the_target_says(out):
    manifest = json.loads((out / "manifest.json").read_text())
    assert [manifest[key] for key in ("target", "provider", "dtype")] == ["abacus", CPU, "float16"]
    assert manifest["session"] == AbacusTarget().session() and manifest["numerics"] == {"dtype": "beads"}
    assert manifest["genai_provider_options"] is None and not (out / "genai_config.json").exists()
    assert {entry["kernel"] for entry in manifest["linears"]} == {"MatMulNBits"}


def test_validate_compares_it_and_its_float_form_and_names_its_candidates(folder, out):
    report = qexport.validate(out, folder, text=TEXT, windows=2, window=64, greedy=4, references=True, sensitivity=True)
    # Rounding to 4 bits is all there is to see: the float file of the same target is closer by far.
    deployed = next(found for found in report.references if found.name == "float16 in ONNX Runtime")
    assert 0 < deployed.logits.kl_mean < report.logits.kl_mean / 100
    assert {better.scheme for better in report.sensitivity.overrides} == {"w8a16_g32"}


def test_mixed_precision_chooses_among_its_candidates(folder, tmp_path):
    recipe = Recipe(scheme="w4a16_g32", lm_head="w4a16_g32").with_calibration(samples=2, sequence_length=32)
    found = qexport.export_auto(
        folder, recipe, out_dir=tmp_path / "out", max_kl=0.01, target="abacus", calibration="random", text=TEXT,
        windows=2, window=64,
    )  # fmt: skip
    assert set(found.schemes.values()) == {"w4a16_g32", "w8a16_g32"}
    assert found.logits.kl_mean <= 0.01 and found.export.manifest.target == "abacus"


def test_what_it_lacks_is_refused_before_weights_are_read(folder, tmp_path):
    def refused(recipe, dtype=None):
        qexport.export(folder, recipe, out_dir=tmp_path / "out", target="abacus", dtype=dtype)

    with pytest.raises(InputError, match=r"q_proj: w8a8_dyn has no kernel: an abacus has no int8 inputs. Take w4a16"):
        refused("w8a8_dyn")
    with pytest.raises(InputError, match="target abacus: computes in float16 or float32 only, not in 'bfloat16'"):
        refused("w4a16_g32_rtn", "bfloat16")
    with pytest.raises(RecipeError, match="prefill: int8 is not supported by .* abacus. Remove it; cpu supports it"):
        refused("w4a16_g32_int8_prompts")


def test_the_command_line_takes_it_and_its_other_dtype(run, folder, tmp_path):
    made = ("-o", tmp_path / "out", "-r", "w4a16_g32_rtn", "--target", "abacus", "--dtype", "float32")
    code, _, err = run("export", folder, *made)
    assert code == 0, err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [manifest[key] for key in ("target", "dtype")] == ["abacus", "float32"]
    assert run("generate", tmp_path / "out", "-p", "w1 w2", "--max-new-tokens", 2)[0] == 0


def test_options_are_the_keys_of_a_recipe_that_a_target_takes():
    recipe = Recipe.load("w4a16_g32_rtn").model_copy(update={"accuracy_level": 1})
    assert CpuTarget.options() == ("accuracy_level", "prefill") and AbacusTarget.options() == ()
    assert target_for("cpu", recipe) == CpuTarget(accuracy_level=1)
