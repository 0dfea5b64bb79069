"""A fault of every kind in one linear of a good export: the report has to name that linear first, and it alone."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import planted_faults
from helpers.breadth import quick
from helpers.tokenizer_files import write_word_tokenizer
from qexport.api.exporting import export
from qexport.api.validating import validate
from qexport.artifact import manifest as manifests
from qexport.capture.folder import capture_folder
from qexport.models.source import open_model
from qexport.recipe.recipe import Recipe
from qexport.validation import Report, worst_first

TEXT = "".join(chr(33 + (i * i * 31 + i * 7) % 94) for i in range(300))  # one token a character
FAULTS = {
    "scale": (planted_faults.wrong_scale, "w4a16_g32", "off in scale"),
    "zero point": (planted_faults.swapped_zero_points, "w4a16_g32_asym", "off in zero point"),
    "unfused": (planted_faults.unfused, "w4a16_g32", "MatMul instead of MatMulNBits"),
    "clipped": (planted_faults.clipped_input, "w8a8_static", "beyond its static scale"),
    "coarse": (planted_faults.coarse_input, "w8a8_static", "times as far as its input"),
    "rows": (planted_faults.swapped_rows, "w4a16_g32", "channels of its weight are not the float ones"),
    "nibbles": (planted_faults.swapped_nibbles, "w4a16_g32", "channels of its weight are not the float ones"),
    "zeroed": (planted_faults.zeroed_group, "w4a16_g32", "off in scale"),
    "shifted": (planted_faults.shifted_scales, "w4a16_g32", "off"),
    "factor": (planted_faults.factor_on_a_channel, "w8a8_static", "off in scale"),
}
CASES = [  # first one for each thing that is said
    ("scale", "model.layers.1.self_attn.k_proj"),
    ("zero point", "model.layers.2.self_attn.o_proj"),
    ("unfused", "model.layers.1.mlp.down_proj"),
    ("clipped", "model.layers.2.mlp.down_proj"),
    ("coarse", "model.layers.0.mlp.down_proj"),
    ("rows", "model.layers.2.mlp.gate_proj"),
    *(
        pytest.param(fault, name, marks=pytest.mark.slow)
        for fault, name in (
            ("scale", "model.layers.3.mlp.down_proj"),
            ("zero point", "model.layers.0.mlp.up_proj"),
            ("unfused", "model.layers.3.self_attn.o_proj"),
            ("clipped", "model.layers.1.self_attn.o_proj"),
            ("nibbles", "model.layers.0.self_attn.v_proj"),
            ("zeroed", "model.layers.3.self_attn.q_proj"),
            ("shifted", "model.layers.1.mlp.down_proj"),
            ("factor", "model.layers.2.self_attn.q_proj"),
        )
    ),
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


@pytest.mark.by_default("scale-*", "clipped-*", "unfused-*")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_planted_fault_is_named_first(good, llama, tmp_path, kind, name):
    plant(good(FAULTS[kind][1]), tmp_path / "out", kind, name)
    names_it(validate(tmp_path / "out", llama, text=TEXT, windows=1, window=64), kind, name)


SCHEMES = ("w4a16_g32", "w4a16_g32_asym", "w8a8_static", "w2a16_g32", "nf4", "w4a8_g128")


# Those of which faulty exports are made above, and the coarsest.
@pytest.mark.by_default("w8a8_static")
@pytest.mark.parametrize("scheme", quick(("w4a16_g32", "w8a8_static"), among=SCHEMES))
def test_rounding_is_no_fault(good, llama, scheme):
    report = validate(good(scheme), llama, text=TEXT, windows=1, window=64)
    assert not report.problems and not any(row.fault for row in report.layers.linears)


def test_a_factor_on_a_smoothed_channel_shows_in_the_reader(good, llama, tmp_path):
    """v is compared up to a factor for each channel, because smoothing puts some there; the row of o says so."""
    shutil.copytree(good("w8a8_static"), tmp_path / "out")
    name = "model.layers.2.self_attn.v_proj"
    entry = next(e for e in manifests.load(tmp_path / "out").linears if e.name == name)
    planted_faults.factor_on_a_channel(tmp_path / "out", entry)
    report = validate(tmp_path / "out", llama, text=TEXT, windows=1, window=64)
    assert [row.name for row in report.layers.linears if row.fault] == ["model.layers.2.self_attn.o_proj"]
    (said,) = report.problems
    assert said.startswith("model.layers.2.self_attn.o_proj: ") and "input channels of its weight are off" in said
    assert said.endswith(f"by a factor of 4; a factor on channels of {name} in front of it would show here too")


def test_a_shared_input_is_a_fault_of_all_that_read_it(good, llama, tmp_path):
    plant(good("w8a8_static"), tmp_path / "out", "clipped", "model.layers.1.self_attn.q_proj")
    report = validate(tmp_path / "out", llama, text=TEXT, windows=1, window=64)
    wrong = [f"model.layers.1.self_attn.{n}_proj" for n in "qkv"]
    found = {row.name: row.fault for row in worst_first(report.layers.linears) if row.fault}
    assert list(found)[0] in wrong and report.problems[0].split(":")[0] == list(found)[0]
    # v's clipped values are smaller, which looks like the factors of smoothing, and so o's row may tell of it too.
    assert set(wrong) <= set(found) and all("self_attn.v_proj in front" in found[n] for n in set(found) - set(wrong))


# Of a real model, where an input's few large channels hide most errors: `make demo` leaves one there.
ROOT = Path(__file__).parents[2]
SMOLLM2 = Path(os.environ.get("QEXPORT_REAL_MODEL") or ROOT / ".cache" / "smollm2")
DOWN, UP, OUT = "mlp.down_proj", "mlp.up_proj", "self_attn.o_proj"
EARLY, MIDDLE, LAST = 1, 0.5, -1  # a layer: by number, from the end, or as a share of all
# By scheme, what is planted at once: linears of one kind of a layer each, so that none is beside another planted one.
REAL = {
    "w8a8_static": [
        [("clipped", EARLY, DOWN), ("clipped", MIDDLE, OUT)],
        [("clipped", MIDDLE, DOWN), ("coarse", EARLY, UP)],
        [("clipped", LAST, DOWN), ("coarse", MIDDLE, UP)],
        [("clipped", LAST, OUT), ("factor", MIDDLE, "self_attn.q_proj")],
    ],
    "w4a16_g32": [
        [("scale", EARLY, "self_attn.q_proj"), ("zeroed", MIDDLE, DOWN), ("rows", LAST, OUT)],
        [("scale", LAST, DOWN), ("nibbles", MIDDLE, UP), ("shifted", 0, "self_attn.v_proj")],
        [("unfused", MIDDLE, DOWN), ("rows", EARLY, UP), ("zeroed", LAST, "self_attn.k_proj")],
    ],
    "w4a16_g32_asym": [
        [("zero point", EARLY, "self_attn.q_proj"), ("zero point", MIDDLE, DOWN)],
        [("zero point", LAST, OUT), ("zero point", 0, DOWN)],
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def captured():
    return capture_folder(open_model(SMOLLM2))


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="run `make demo` first, which fetches the model")
@pytest.mark.parametrize("scheme", REAL)
def test_faults_all_over_a_real_model_are_named(captured, tmp_path, scheme):
    def validated(folder: Path) -> Report:
        return validate(folder, captured, text=text[len(text) // 2 :], windows=1, window=128, greedy=0)

    # English of some length: what a model writes of itself takes longer than all that is tested here.
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "half.md").write_text(text[: len(text) // 2], encoding="utf-8")
    recipe = Recipe.load("w8a8_static") if scheme == "w8a8_static" else Recipe(scheme=scheme)
    recipe = recipe.with_calibration(source=str(tmp_path / "half.md"), samples=8, sequence_length=128)
    export(SMOLLM2, recipe, out_dir=tmp_path / "good")
    assert not validated(tmp_path / "good").problems
    entries = {e.name: e for e in manifests.load(tmp_path / "good").linears}
    layers = len({e.block for e in entries.values() if ".layers." in e.name})
    for at_once in REAL[scheme]:
        planted = {}
        shutil.copytree(tmp_path / "good", tmp_path / "out")
        for kind, where, linear in at_once:
            layer = int(where * layers) if isinstance(where, float) else where % layers
            name = f"model.layers.{layer}.{linear}"
            FAULTS[kind][0](tmp_path / "out", entries[name])
            planted[name] = kind
        report = validated(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        found = {row.name: row.fault for row in report.layers.linears if row.fault}
        for name, kind in planted.items():
            said = found.get(name, "nothing")
            # What a scale that is too small cuts off may be very little, and weigh the most.
            assert (FAULTS[kind][2] in said) or (kind in ("clipped", "coarse") and "its SQNR of" in said), (name, said)
            assert any(problem.startswith(name) for problem in report.problems) or kind == "unfused"
        # gate and up read one value; what is behind a linear that is wrong in every channel leaves its range.
        inputs = {e.input for e in entries.values() if e.name in planted}
        first = min(int(name.split(".")[2]) for name in planted)
        strange = [n for n in found if n not in planted and entries[n].input not in inputs]
        assert not [n for n in strange if int(n.split(".")[2]) < first], "nothing in front of the first is wrong"
        assert len(strange) <= 2 * len(planted), strange
