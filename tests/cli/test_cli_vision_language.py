"""Models of pictures and text on the command line."""

import io
import json

import pytest

from helpers.random_pictures import picture_file, save_pictures_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pictures_model("llava", tmp_path_factory.mktemp("model") / "llava")


@pytest.mark.slow
def test_inspect_export_validate_generate_chat(model, run, tmp_path, monkeypatch):
    code, shown, _ = run("inspect", model, "-r", "w8a8_dyn")
    assert code == 0 and all(f"{part}: w8a8_dyn" in shown for part in ("vision", "decoder"))
    out, picture = tmp_path / "out", picture_file(tmp_path)
    code, shown, _ = run("export", model, "-o", out, "-r", "w4a16_g32_rtn", "--json")
    made = json.loads(shown)
    assert code == 0 and set(made["parts"]) == {"vision", "embedding", "decoder"}
    code, shown, _ = run("export", model, "-o", out, "-r", "w8a8_dyn", "--overwrite")
    assert code == 0 and f"qexport generate {out} --image FILE --prompt" in shown
    code, shown, _ = run("generate", out, "-p", "what is it", "--image", picture, "--max-new-tokens", 4)
    assert code == 0 and shown.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {picture}\nwhat is it\n"))
    code, talked, _ = run("chat", out, "--max-new-tokens", 4, "--quiet")
    code_, shown, _ = run("generate", out, "--chat", "-p", "what is it", "--image", picture, "--max-new-tokens", 4)
    assert code == code_ == 0 and talked.strip() == shown.strip()
    text = tmp_path / "text.txt"
    text.write_text("words and more words, " * 20)
    given = ("--reference", model, "--text", text, "--windows", 2, "--window", 16, "--greedy", 4)
    code, shown, _ = run("validate", out, *given)
    assert code == 0 and "a token of the text after pictures" in shown
    assert all((out / part / "report.html").is_file() for part in ("vision", "embedding", "decoder"))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("export", "MODEL", "-o", "out", "--curve"), "point of a curve is one"),
        (("export", "MODEL", "-o", "out", "--max-kl", "0.1", "--context", "64"), "in several files is not counted"),
        (("export", "MODEL", "-o", "out", "-r", "w8a8_static", "--calibration", "no.jsonl"), "no.jsonl: cannot"),
        (("inspect", "MODEL", "--calibrate"), "only measured when it is exported"),
    ],
)
def test_what_it_does_not_take(model, run, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, _, shown = run(*(model if word == "MODEL" else word for word in arguments))
    assert code == 2 and said in shown


def test_models_of_text_read_no_pictures(export_folder, run, tmp_path):
    out = export_folder("llama", "w4a16_g32_rtn")
    code, _, shown = run("generate", out, "-p", "a", "--image", picture_file(tmp_path))
    assert code == 2 and "does not read pictures" in shown
