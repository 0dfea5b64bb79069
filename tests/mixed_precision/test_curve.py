import json
import math
import re

import pytest

from helpers.random_decoders import save_model
from helpers.tokenizer_files import write_word_tokenizer
from qexport.api import curve as tracing
from qexport.api.validating import validate
from qexport.mixed_precision.curve import estimated, knee, sizes_between, spread_over
from qexport.recipe.recipe import Recipe
from qexport.report import read_export

TEXT = " ".join(f"w{i * i % 97}" for i in range(600))


def test_sizes_have_both_ends_and_measured_ones_lie_closer_where_bytes_are_few():
    assert sizes_between(100, 200, 5) == [100, 125, 150, 175, 200]
    places = sorted(spread_over(13, 6))
    assert places[0] == 0 and places[-1] == 12 and len(places) == 6
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert gaps[0] == min(gaps) < max(gaps) == gaps[-1]
    assert spread_over(3, 6) == {0, 1, 2}


def test_what_was_not_measured_lies_between_what_was():
    known = [(8.0, 2.0), (0.5, 0.05), (0.001, 0.001)]
    assert [estimated(cost, known) for cost, _ in known] == pytest.approx([kl for _, kl in known])
    assert estimated(2.0, known) == pytest.approx(2.0 * math.sqrt(0.25 * 0.1))  # 2 is halfway from .5 to 8
    assert estimated(32.0, known) == pytest.approx(8.0) and estimated(1e-4, known) == pytest.approx(1e-4)


def test_the_knee_is_where_more_bytes_stop_to_pay():
    assert knee([(10, 5.0), (20, 0.4), (30, 0.2), (40, 0.1)]) == 1
    assert knee([(40, 0.1), (10, 5.0)]) in (0, 1) and knee([(10, 5.0)]) == 0


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve")
    model = save_model("llama_bias", folder / "model")
    write_word_tokenizer(model, 128)
    return model, folder / "out"


def test_a_curve_from_the_command_line(exported, run, monkeypatch, tmp_path):
    monkeypatch.setattr(tracing, "_SIZES", 3)
    monkeypatch.setattr(tracing, "_MEASURED", 2)
    model, out = exported
    recipe, text = tmp_path / "plain.yaml", tmp_path / "text.txt"
    recipe.write_text("scheme: w4a16_g16\nlm_head: w4a16_g16\nembedding: tied\n")
    text.write_text(TEXT)
    code, said, _ = run(
        "export", model, "-o", out, "--curve", "-r", recipe, "--text", text, "--calibration", "random",
        "--samples", 4, "--sequence-length", 64,
    )  # fmt: skip
    assert code == 0
    kept = json.loads((out / "report.json").read_text())["curve"]
    points = kept["points"]
    assert [point["measured"] for point in points].count(True) == 2 and len(points) == 3
    assert [point["bytes"] for point in points] == sorted(point["bytes"] for point in points)
    first, last = points[0], points[-1]
    assert set(first["schemes"]) == {"w2a16_g64_asym_s8"} and all(name.startswith("w8") for name in last["schemes"])
    assert first["kl"] > 10 * last["kl"]
    assert all(len(re.findall(re.escape(point["recipe"]), said)) == 1 for point in points)
    recipes = [Recipe.load(out / point["recipe"]) for point in points]
    assert recipes[0].scheme == "w2a16_g64_asym_s8" and recipes[0].lm_head == "w2a16_g64_asym_s8"
    # The folder is one of the measured exports, and the page shows where it lies.
    size = sum(file.stat().st_size for file in out.glob("model.onnx*"))
    assert size in [point["bytes"] for point in points if point["measured"]]
    validate(out, model, text=TEXT, windows=1, window=64)
    page = (out / "report.html").read_text()
    assert "KL against bytes" in page and page.count("this export") >= 1
    assert read_export(out).curve.points[0].bytes == first["bytes"]
