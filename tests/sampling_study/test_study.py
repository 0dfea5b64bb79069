"""A whole study of small random models, from Python and as a user types it."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch

import qexport
from helpers.random_decoders import reference_model, save_model
from helpers.tokenizer_files import LETTERS, write_word_tokenizer
from qexport.errors import InputError
from qexport.sampling_study.result import Study

FLOAT = qexport.Recipe(scheme="w8a16", overrides=[{"match": "*", "scheme": "float"}])
PROMPTS = ("abc", "Once upon", "x = 1")
GRID = qexport.Grid(temperatures=(0, 1.0), top_ks=(0, 5), max_new_tokens=(6, 12), seeds=(0, 1))


@pytest.fixture(scope="module")
def model(model_with_tokenizer) -> Path:
    return model_with_tokenizer


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("exports")
    for name, recipe in (("exact", FLOAT), ("w2", "w2a16_g32"), ("w8", "w8a16_g32")):
        chosen = qexport.Recipe.load(recipe) if isinstance(recipe, str) else recipe
        chosen = chosen.model_copy(update={"accuracy_level": 1})
        qexport.export(model, chosen, out_dir=out / name)
    shutil.copytree(out / "w2", out / "again" / "w2")
    return {"exact": out / "exact", "w2": out / "w2", "w8": out / "w8", "copy": out / "again" / "w2"}


@pytest.fixture(scope="module")
def result(model, folders) -> Study:
    return qexport.study(list(folders.values()), model, grid=GRID, prompts=PROMPTS, threads=1)


def refused(result, *parts):
    code, out, err = result
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and out == "" and len(errors) == 1 and "Traceback" not in err
    for part in parts:
        assert str(part) in errors[0]


def changed(folder, out, change) -> Path:
    """A copy of an export whose manifest is changed."""
    shutil.copytree(folder, out)
    manifest = out / "manifest.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    return out


def by_setting(result, name):
    return {(r.temperature, r.top_k, r.max_new_tokens): r for r in result.rows if r.format == name}


def test_every_setting_once_and_the_likeliest_token_once(result, folders):
    names = [found.name for found in result.formats]
    # Two folders of one name are told apart by their paths.
    assert names == ["float", "exact", str(folders["w2"]), "w8", str(folders["copy"])]
    for name in names:
        found = by_setting(result, name)
        assert list(found) == [(t, k, n) for n in (6, 12) for t, k in ((0, 0), (1, 0), (1, 5))]
        assert {key[0]: row.texts for key, row in found.items()} == {0: 3, 1: 6}


def test_two_copies_of_a_folder_write_the_same(result, folders):
    first, second = (by_setting(result, str(folders[name])) for name in ("w2", "copy"))
    plain = {"format", "tokens_per_second", "tokens_per_second_spread"}
    assert [row.model_dump(exclude=plain) for row in first.values()] == [
        row.model_dump(exclude=plain) for row in second.values()
    ]
    assert any(row.prefix_share < 1 for row in first.values()), "2 bits change texts, or this test shows nothing"


def test_an_export_in_float_writes_what_the_float_model_writes(result, folders):
    for row in by_setting(result, "exact").values():
        assert row.distance < 1e-4 and row.prefix_share == 1 and row.token_agreement == 1
        assert row.perplexity_ratio == 1 and row.repetition_change == 0
    bits = [by_setting(result, name)[1.0, 0, 12].distance for name in ("exact", "w8", str(folders["w2"]))]
    assert bits == sorted(bits) and bits[1] < bits[2] / 2


def test_perplexity_is_that_of_transformers(model, folders):
    grid = qexport.Grid(temperatures=(0.9,), top_ks=(0,), max_new_tokens=(8,), seeds=(4,))
    found = qexport.study([folders["w2"]], model, grid=grid, prompts=PROMPTS[:1], threads=1)
    sampling = qexport.Sampling(0.9, seed=4)
    from transformers import AutoTokenizer

    from qexport.runtime.decoder import open_decoder

    ids = AutoTokenizer.from_pretrained(model)(PROMPTS[0])["input_ids"]
    decoder = open_decoder(folders["w2"], threads=1)
    text = decoder.generate([ids], max_new_tokens=8, eos_token_ids=[2], sampling=sampling).tokens[0]
    with torch.no_grad():
        logits = reference_model(model)(torch.tensor([[*ids, *text]])).logits[0, len(ids) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(text)).exp()
    assert found.rows[1].perplexity == pytest.approx(float(expected), rel=1e-4)
    assert found.rows[1].distance_error is None and "nothing can be called clear" in found.conclusions[0]


def test_a_shorter_length_is_the_start_of_the_longer_one(model, folders, result):
    grid = qexport.Grid(temperatures=(1.0,), top_ks=(5,), max_new_tokens=(6,), seeds=(0, 1))
    alone = qexport.study([folders["w2"]], model, grid=grid, prompts=PROMPTS, threads=1)
    speed = {"format", "tokens_per_second", "tokens_per_second_spread"}
    expected = by_setting(result, str(folders["w2"]))[1.0, 5, 6].model_dump(exclude=speed)
    # The float model reads another number of tokens at once, which rounds differently.
    assert by_setting(alone, "w2")[1.0, 5, 6].model_dump(exclude=speed) == pytest.approx(expected, rel=1e-5)


def test_an_estimate_comes_before_the_work(model, folders):
    seen = []
    qexport.study(
        [folders["w8"]], model, grid=qexport.Grid(temperatures=(0,), max_new_tokens=(4,)), prompts=["ab"],
        on_estimate=seen.append, progress=lambda stage, what, done, total: seen.append(stage),
    )  # fmt: skip
    assert (seen[2].texts, seen[2].tokens) == (2, 4) and seen[2].seconds > 0
    assert seen[:2] == ["load", "load"] and set(seen[3:]) == {"texts"}
    assert str(seen[2]).startswith("2 texts of up to 4 tokens: about ")


def test_the_document_comes_back_whole(result, tmp_path):
    path = result.save(tmp_path / "study.json")
    data = json.loads(path.read_text())
    assert data["format"] == 1 and Study.model_validate(data) == result
    assert data["versions"].keys() == {"qexport", "torch", "transformers", "numpy", "onnxruntime"}
    assert {type(v) for row in data["rows"] for v in row.values()} <= {str, int, float, type(None)}
    assert [p.name for p in tmp_path.iterdir()] == ["study.json"]
    with pytest.raises(InputError, match="no such folder"):
        result.save(tmp_path / "nowhere" / "study.json")


@pytest.mark.slow
def test_the_command(run, model, folders, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "prompts.txt").write_text("abc\n\nOnce upon\n")
    code, out, err = run(
        "study", folders["w2"], folders["w8"], "--reference", model, "--temperature", 0, "--temperature", 1,
        "--top-k", 5, "--max-new-tokens", 6, "--seed", 0, "--prompts", tmp_path / "prompts.txt", "--threads", 1,
        "-o", tmp_path / "study.json", "--plot", tmp_path / "study.png",
    )  # fmt: skip
    assert code == 0 and "12 texts of up to 6 tokens: about" in err and "texts 4/4" in err
    found = Study.model_validate_json((tmp_path / "study.json").read_text())
    assert found.prompts == ("abc", "Once upon") and found.reference == model.name and len(found.rows) == 6
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["format", "float", "w2", "w8"]
    assert all(f"- {sentence}" in lines for sentence in found.conclusions)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_as_json(run, model, folders):
    code, out, err = run(
        "study", folders["w8"], "--reference", model, "--temperature", 0, "--max-new-tokens", 4, "--json"
    )
    found = Study.model_validate_json(out)
    assert code == 0 and len(found.rows) == 2 and found.temperatures == (0,) and found.threads is None


def test_a_folder_that_cannot_be_studied(run, model, folders, tmp_path):
    refused(run("study", tmp_path / "none", "--reference", model), tmp_path / "none", "no such folder")
    refused(run("study", model, "--reference", model), "not an export of qexport")
    refused(run("study", folders["w2"], folders["w2"], "--reference", model), "the same folder twice")
    module = changed(folders["w2"], tmp_path / "module", lambda manifest: manifest | {"kind": "module"})
    refused(run("study", module, "--reference", model), "this export is a module")


def test_another_model_among_the_folders(run, model, folders, tmp_path):
    larger = changed(
        folders["w2"], tmp_path / "larger", lambda m: m | {"settings": m["settings"] | {"vocab_size": LETTERS + 2}}
    )
    refused(run("study", folders["w2"], larger, "--reference", model), "its vocab_size is 98, not 100")
    same_sizes = save_model("llama", tmp_path / "twin", vocab_size=LETTERS, seed=1)
    write_word_tokenizer(same_sizes, LETTERS)
    refused(run("study", folders["w2"], "--reference", same_sizes), "has other values")


def test_settings_out_of_range(run, model, folders, tmp_path):
    command = ["study", folders["w2"], "--reference", model]
    refused(run(*command, "--temperature", -0.5), "temperatures: -0.5 is out of range. Give 0 or more")
    refused(run(*command, "--temperature", "nan"), "temperatures: nan is out of range")
    refused(run(*command, "--top-k", -1), "top_ks: -1 is out of range")
    refused(run(*command, "--max-new-tokens", 0), "max_new_tokens: 0 is out of range. Give 1 or more")
    refused(run(*command, "--max-new-tokens", 126), "do not fit: the model reads 128")
    refused(run(*command, "--prompts", tmp_path / "none.txt"), "none.txt: cannot read the prompts")
    (tmp_path / "empty.txt").write_text(" \n\n")
    refused(run(*command, "--prompts", tmp_path / "empty.txt"), "empty.txt: no prompt in it")
    refused(run(*command, "-o", tmp_path / "nowhere" / "x.json"), "nowhere: no such folder")
    refused(run(*command, "--plot", tmp_path / "x.pdf"), "a plot is a PNG file")


def test_a_model_without_a_tokenizer(run, folders, model, tmp_path):
    bare = Path(shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    refused(run("study", folders["w2"], "--reference", bare), "prompts need a tokenizer")


def test_a_plot_without_matplotlib(run, model, folders, monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(
        run("study", folders["w2"], "--reference", model, "--plot", tmp_path / "x.png"),
        'a plot needs matplotlib. Install it: pip install "matplotlib>=3.10"',
    )
