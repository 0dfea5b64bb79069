"""Encoder-decoders on the command line."""

import json

import pytest

from helpers.random_modules import VOCAB, save_seq2seq
from helpers.tokenizer_files import write_word_tokenizer
from qexport.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_seq2seq("t5", tmp_path_factory.mktemp("model") / "t5", gain=2.0)
    write_word_tokenizer(folder, VOCAB)
    return folder


@pytest.fixture
def qexport(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["qexport", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_export_validate_generate(model, qexport, tmp_path):
    out = tmp_path / "out"
    code, shown, _ = qexport("export", model, "-o", out, "-r", "w4a16_g32_rtn")
    assert code == 0 and f"{out / 'encoder'}: " in shown and f"{out / 'decoder'}: " in shown
    assert f"qexport validate {out} --reference {model}" in shown
    text = tmp_path / "text.txt"
    text.write_text("words and more words, " * 20)
    options = ("--reference", model, "--text", text, "--windows", 2, "--window", 16, "--greedy", 4)
    code, shown, _ = qexport("validate", out, *options)
    assert code == 0 and "KL median / 99 %" in shown and "output logits" in shown
    assert str(out / "decoder" / "report.html") in shown
    assert json.loads((out / "report.json").read_text())["validation"]["logits"]["windows"] == 2
    code, shown, _ = qexport("generate", out, "-p", "a long text", "--max-new-tokens", 5)
    assert code == 0 and shown.strip()
    code, shown, _ = qexport("report", out / "decoder")
    assert code == 0 and "report.html" in shown


def test_inspect(model, qexport):
    code, shown, _ = qexport("inspect", model, "-r", "w8a8_dyn")
    assert code == 0 and "encoder: w8a8_dyn" in shown and "decoder: w8a8_dyn" in shown


def test_results_as_json(model, qexport, tmp_path):
    code, shown, _ = qexport("inspect", model, "-r", "w4a16_g32_rtn", "--json")
    foretold = json.loads(shown)
    parts = foretold["parts"]
    assert code == 0 and set(parts) == {"encoder", "decoder"}
    assert foretold["bytes"]["quantized"] == sum(part["bytes"]["quantized"] for part in parts.values())
    code, shown, _ = qexport("export", model, "-o", tmp_path / "out", "-r", "w4a16_g32_rtn", "--json")
    made = json.loads(shown)
    assert code == 0 and made["folder"] == str(tmp_path / "out") and set(made["parts"]) == set(parts)
    assert made["bytes"]["quantized_linears"] == foretold["bytes"]["quantized"]
    assert made["quantized_linears"] == sum(part["quantized_linears"] for part in made["parts"].values()) == 26


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("export", "MODEL", "-o", "out", "--curve"), "point of a curve is one"),
        (("inspect", "MODEL", "--calibrate"), "only measured when it is exported"),
        (("export", "MODEL", "-o", "out", "-r", "compact_kv8"), "kv_cache"),
    ],
)
def test_what_it_does_not_take(model, qexport, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = qexport(*(model if argument == "MODEL" else argument for argument in arguments))
    assert code == 2 and out == "" and said in err and "Traceback" not in err and not list(tmp_path.iterdir())
