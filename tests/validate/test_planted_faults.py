"""A fault of every kind in one linear of a good export: the report has to name that linear first, and it alone."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import planting
from qexport.export import export
from qexport.recipe import Recipe
from qexport.runtime import manifest as manifests
from qexport.validate import Report, validate, worst_first
from tiny_decoder import write_word_tokenizer

TEXT = "".join(chr(33 + (i * i * 31 + i * 7) % 94) for i in range(300))  # one token a character
FAULTS = {
    "scale": (planting.wrong_scale, "w4a16_g32", "off in scale"),
    "zero point": (planting.swapped_zero_points, "w4a16_g32_asym", "off in zero point"),
    "unfused": (planting.unfused, "w4a16_g32", "MatMul instead of MatMulNBits"),
    "clipped": (planting.clipped_input, "w8a8_static", "beyond its static scale"),
}
CASES = [
    ("scale", "model.layers.1.self_attn.k_proj"),
    ("scale", "model.layers.3.mlp.down_proj"),
    ("zero point", "model.layers.2.self_attn.o_proj"),
    ("zero point", "model.layers.0.mlp.up_proj"),
    ("unfused", "model.layers.1.mlp.down_proj"),
    ("unfused", "model.layers.3.self_attn.o_proj"),
    ("clipped", "model.layers.2.mlp.down_proj"),
    ("clipped", "model.layers.1.self_attn.o_proj"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama of four layers, so that every linear has three others like it."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=256, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    write_word_tokenizer(folder, 128)
    return folder


@pytest.fixture(scope="module")
def good(llama, tmp_path_factory):
    """good(scheme): an export of it, made once."""
    made: dict[str, Path] = {}

    def export_once(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp("good") / "out"
            recipe = "w8a8_static" if scheme == "w8a8_static" else Recipe(scheme=scheme)
            ids = torch.randint(3, 128, (8, 48), generator=torch.Generator().manual_seed(0))
            export(llama, recipe, out_dir=made[scheme], calibration=ids if recipe == "w8a8_static" else None)
        return made[scheme]

    return export_once


def plant(good: Path, folder: Path, kind: str, name: str) -> str:
    """Copy an export and plant a fault; returns the name of the linear."""
    shutil.copytree(good, folder)
    entry = next(e for e in manifests.load(folder).linears if e.name == name)
    FAULTS[kind][0](folder, entry)
    return name


def names_it(report: Report, kind: str, name: str) -> None:
    worst = worst_first(report.layers.linears)[0]
    assert worst.name == name and FAULTS[kind][2] in worst.fault
    assert name in report.problems[0] and FAULTS[kind][2] in report.verdict[0]
    others = [row.name for row in report.layers.linears if row.fault and row.name != name]
    assert not others and len(report.problems) == 1, "nothing else is wrong"


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_planted_fault_is_named_first(good, llama, tmp_path, kind, name):
    plant(good(FAULTS[kind][1]), tmp_path / "out", kind, name)
    names_it(validate(tmp_path / "out", llama, text=TEXT, windows=1, window=64), kind, name)


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g32_asym", "w8a8_static", "w2a16_g32", "nf4", "w4a8_g128"])
def test_rounding_is_no_fault(good, llama, scheme):
    report = validate(good(scheme), llama, text=TEXT, windows=1, window=64)
    assert not report.problems and not any(row.fault for row in report.layers.linears)
