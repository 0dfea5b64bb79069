"""A fault of every kind in one linear of a good export: the report has to name that linear first, and it alone."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import planting
from qexport.api.exporting import export
from qexport.api.validating import validate
from qexport.artifact import manifest as manifests
from qexport.recipe.recipe import Recipe
from qexport.validation import Report, worst_first
from tiny_decoder import write_word_tokenizer

TEXT = "".join(chr(33 + (i * i * 31 + i * 7) % 94) for i in range(300))  # one token a character
FAULTS = {
    "scale": (planting.wrong_scale, "w4a16_g32", "off in scale"),
    "zero point": (planting.swapped_zero_points, "w4a16_g32_asym", "off in zero point"),
    "unfused": (planting.unfused, "w4a16_g32", "MatMul instead of MatMulNBits"),
    "clipped": (planting.clipped_input, "w8a8_static", "beyond its static scale"),
    "coarse": (planting.coarse_input, "w8a8_static", "times as far as its input"),
    "rows": (planting.swapped_rows, "w4a16_g32", "channels of its weight are not the float ones"),
    "nibbles": (planting.swapped_nibbles, "w4a16_g32", "channels of its weight are not the float ones"),
    "zeroed": (planting.zeroed_group, "w4a16_g32", "off in scale"),
    "shifted": (planting.shifted_scales, "w4a16_g32", "off"),
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
    ("coarse", "model.layers.0.mlp.down_proj"),
    ("rows", "model.layers.2.mlp.gate_proj"),
    ("nibbles", "model.layers.0.self_attn.v_proj"),
    ("zeroed", "model.layers.3.self_attn.q_proj"),
    ("shifted", "model.layers.1.mlp.down_proj"),
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
            recipe = scheme if scheme == "w8a8_static" else Recipe(scheme=scheme)
            ids = torch.randint(3, 128, (8, 48), generator=torch.Generator().manual_seed(0))
            export(llama, recipe, out_dir=made[scheme], calibration=ids if scheme == "w8a8_static" else None)
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


def test_a_factor_on_a_smoothed_channel_shows_in_the_reader(good, llama, tmp_path):
    """v is compared up to a factor for each channel, because smoothing puts some there; the row of o says so."""
    shutil.copytree(good("w8a8_static"), tmp_path / "out")
    name = "model.layers.2.self_attn.v_proj"
    entry = next(e for e in manifests.load(tmp_path / "out").linears if e.name == name)
    planting.factor_on_a_channel(tmp_path / "out", entry)
    report = validate(tmp_path / "out", llama, text=TEXT, windows=1, window=64)
    assert [row.name for row in report.layers.linears if row.fault] == ["model.layers.2.self_attn.o_proj"]
    assert report.verdict[0].startswith("model.layers.2.self_attn.o_proj: its SQNR of ")
    assert report.verdict[0].endswith(f"a factor on channels of {name} in front of it would show here too")


def test_a_shared_input_is_a_fault_of_all_that_read_it(good, llama, tmp_path):
    plant(good("w8a8_static"), tmp_path / "out", "clipped", "model.layers.1.self_attn.q_proj")
    report = validate(tmp_path / "out", llama, text=TEXT, windows=1, window=64)
    wrong = [f"model.layers.1.self_attn.{n}_proj" for n in "qkv"]
    found = {row.name: row.fault for row in worst_first(report.layers.linears) if row.fault}
    assert list(found)[0] in wrong and report.problems[0].split(":")[0] == list(found)[0]
    # v's clipped values are smaller, which looks like the factors of smoothing, and so o's row may tell of it too.
    assert set(wrong) <= set(found) and all("self_attn.v_proj in front" in found[n] for n in set(found) - set(wrong))


# Of a real model, where an input's few large channels hide most errors: `make demo` leaves one there.
SMOLLM2 = Path(__file__).parents[2] / ".cache" / "smollm2"


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="run `make demo` first, which fetches the model")
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("scale", "model.layers.17.self_attn.k_proj"),
        ("zero point", "model.layers.20.mlp.down_proj"),
        ("unfused", "model.layers.8.mlp.down_proj"),
        ("clipped", "model.layers.10.mlp.down_proj"),
    ],
)
def test_a_fault_in_a_real_model_is_named_first(tmp_path, kind, name):
    scheme = FAULTS[kind][1]
    recipe = Recipe.load("w8a8_static") if scheme == "w8a8_static" else Recipe(scheme=scheme)
    export(SMOLLM2, recipe.with_calibration(source="self", samples=8, sequence_length=128), out_dir=tmp_path / "good")
    assert not validate(tmp_path / "good", SMOLLM2, windows=1, window=256).problems
    plant(tmp_path / "good", tmp_path / "out", kind, name)
    names_it(validate(tmp_path / "out", SMOLLM2, windows=1, window=256), kind, name)
