"""The command line as a user types it: results and exit codes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qexport
from helpers.commands import Command
from helpers.refused import leftovers, refused
from helpers.report_folders import a_study
from qexport.capture.decoder import capture_decoder  # noqa: F401  imports what commands need before they are timed


def shell(*arguments):
    """As a shell starts it."""
    command = [sys.executable, "-c", "from qexport.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_export_keeps_results_and_progress_apart(model, tmp_path):
    done = Command(tmp_path / "notes", "export", model, "-o", tmp_path / "out", "-r", "w4a16_g32_rtn", "--json")
    assert done.wait() == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["folder"] == str(tmp_path / "out") and summary["quantized_linears"] == 14
    assert summary["bytes"]["model"] == sum(
        (tmp_path / "out" / n).stat().st_size for n in ("model.onnx", "model.onnx.data")
    )
    stages = [" ".join(line.split()[:2]) for line in done.stderr.splitlines()]
    shown = ["[1/6] capture", "[2/6] check", "[4/6] quantize", "[5/6] write", "[6/6] run"]
    assert list(dict.fromkeys(stages)) == shown, "progress and nothing else; there is nothing to calibrate"
    assert leftovers(tmp_path) == ["notes", "out"]


def test_export_auto_keeps_the_size_and_says_what_it_chose(model, tmp_path, run):
    given = ("--calibration", "random", "--samples", 4, "--sequence-length", 32)
    out = tmp_path / "out"
    code, said, err = run("export", model, "-o", out, "--auto", "--max-bytes", "140kB", "-r", "w4a16_g32_rtn", *given)
    assert code == 0, err
    assert sum((out / n).stat().st_size for n in ("model.onnx", "model.onnx.data")) <= 140_000
    assert "chosen: " in said and "KL " in said and "predicted" in said
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "options, part",
    [
        (["--auto"], "either the most bytes or the largest KL"),
        (["--max-bytes", "90 parsecs"], "not a size: '90 parsecs'"),
        (["--max-bytes", "1MB", "--resume"], "does not go with --resume, --logits last or --max-length"),
        (["--max-kl", "0"], "only the float model has a KL of 0"),
        (["--max-bytes", "1kB", "-r", "w4a16_g32_rtn", "--calibration", "random", "--samples", "2"], "are too few"),
    ],
)
def test_export_auto_refuses(model, tmp_path, run, options, part):
    refused(run("export", model, "-o", tmp_path / "out", *options), part)
    assert leftovers(tmp_path) == []


def test_export_for_people(model, tmp_path, run):
    code, out, err = run(
        "export",
        model,
        "-o",
        tmp_path / "out",
        "--calibration",
        "random",
        "--samples",
        4,
        "--sequence-length",
        32,
        "--seed",
        7,
    )
    assert code == 0
    assert "15 of 15 linears quantized" in out and "bits cost KL" in out
    assert f"Next: qexport validate {tmp_path / 'out'} --reference {model}\n" in out
    assert "4 sequences of 32 random tokens (seed 7)" in out
    assert "error" not in err


def test_export_of_the_last_logits(model, tmp_path, run):
    code, _, err = run("export", model, "-o", tmp_path / "out", "-r", "w4a16_g32_rtn", "--logits", "last")
    assert code == 0 and "error" not in err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["logits"] == "last"
    refused(run("validate", tmp_path / "out", "--reference", model), "logits of the last token only", "with logits all")
    refused(run("export", model, "-o", tmp_path / "b", "--logits", "first"), "unknown logits 'first'", "all or last")
    code, text, _ = run("generate", tmp_path / "out", "--prompt", "abc", "--max-new-tokens", 8)
    assert code == 0 and len(text) > 1


def test_a_width_that_does_not_divide_falls_back_and_says_so(model, tmp_path, run):
    said = "96 input features do not divide into groups of 64: groups of 32"
    code, out, _ = run("export", model, "-o", tmp_path / "out", "-r", "nf4")
    assert code == 0 and f"model.layers.[0-1].mlp.down_proj (2): nf4_g32, {said}" in out
    code, out, _ = run("inspect", model, "-r", "nf4")
    assert code == 0 and "model.layers.[0-1].mlp.down_proj" in out and said in out


def test_inspect_reads_no_weight(copy, run):
    weights = load_file(copy / "model.safetensors")
    save_file({name: torch.full_like(t, float("nan")) for name, t in weights.items()}, copy / "model.safetensors")
    code, out, _ = run("inspect", copy, "-r", "w8a8_static", "--json")
    found = json.loads(out)
    assert code == 0 and found["calibrates"] and found["smooths"]
    down = found["linears"][6]
    # 64 x 96 codes of a byte, and 64 scales of float32.
    assert (down["name"], down["scheme"], down["bytes"]) == (
        "model.layers.0.mlp.down_proj",
        "w8a8_static",
        64 * 96 + 64 * 4,
    )
    folds = {
        tuple(n.rpartition(".")[2] for n in s["linears"]): s["fold"]
        for s in found["sites"]
        if s["block"] == "model.layers.0"
    }
    assert folds == {
        ("q_proj", "k_proj", "v_proj"): "norm",
        ("o_proj",): "model.layers.0.self_attn.v_proj",
        ("gate_proj", "up_proj"): "norm",
        ("down_proj",): "model.layers.0.mlp.up_proj",
    }


def test_inspect_foretells_the_size(model, exported, run):
    _, out, _ = run("inspect", model, "-r", "w4a16_g32_rtn", "--json")
    foretold, real = json.loads(out)["bytes"], json.loads((exported / "manifest.json").read_text())["bytes"]
    assert foretold["quantized"] == real["quantized_linears"]
    # Tensors of a few bytes lie in model.onnx, beside the graph.
    assert (exported / "model.onnx.data").stat().st_size <= foretold["total"] < real["model"]


def test_inspect_all_lists_every_linear(model, run):
    _, out, _ = run("inspect", model, "--all")
    assert all(f"model.layers.{i}.self_attn.{n}_proj" in out for i in (0, 1) for n in "qkvo")


def test_validate(model, exported, run):
    code, out, err = run("validate", exported, "--reference", model, "--windows", 2, "--window", 32, "--json")
    assert code == 0 and json.loads(out)["logits"]["windows"] == 2
    options = ("--windows", 2, "--window", 32, "--references", "--greedy", 4)
    code, out, err = run("validate", exported, "--reference", model, *options)
    assert code == 0 and "perplexity, quantized" in out and "error" not in err
    assert "float16 in PyTorch" in out and "float32 in ONNX Runtime" in out and "of 4 tokens after 2 prompts" in out
    code, _, err = run("validate", exported, "--reference", model, "--greedy", -1)
    assert code == 2 and "--greedy" in err


def test_a_missed_limit_exits_with_1_and_says_which(model, exported, run):
    asked = ("validate", exported, "--reference", model, "--windows", 2, "--window", 32, "--greedy", 0)
    code, out, err = run(*asked, "--max-kl", 100, "--max-ppl-rise", "50%", "--min-top1", "100%")
    (missed,) = [line for line in err.splitlines() if line.startswith("--")]
    assert code == 1 and " ± " in missed
    assert missed.startswith("--min-top1 missed: the likeliest token is the same for ")
    assert missed.endswith(", and at least 100 % is allowed") and missed in out
    found = json.loads((exported / "report.json").read_text())["validation"]
    assert [gate["passed"] for gate in found["gates"]] == [True, True, False] and found["quality"]["measures"]
    assert f'<li class="missed">{missed}</li>' in (exported / "report.html").read_text()
    assert run(*asked, "--max-kl", 100)[0] == 0
    refused(run(*asked, "--max-ppl-rise", 5), "not a share: '5'", "--max-ppl-rise", "such as 5%")
    refused(run(*asked, "--max-kl", -1), "max_kl", "not a limit")


def test_report(model, exported, tmp_path, run):
    refused(run("report"), "no folder given")
    (never := tmp_path / "never").mkdir()
    for name in ("manifest.json", "model.onnx"):
        shutil.copy(exported / name, never)
    refused(run("report", never), never, "never validated", "Run qexport validate")
    code, out, _ = run("validate", exported, "--reference", model, "--windows", 2, "--window", 32)
    page = exported / "report.html"
    assert code == 0 and str(page) in out and "</html>" in page.read_text()
    assert "| perplexity, quantized |" in (exported / "README.md").read_text()
    assert f"qexport validate out --reference {model.name} --windows 2 --window 32" in page.read_text()
    page.unlink()
    code, out, err = run("report", exported)
    assert code == 0 and "perplexity, quantized" in out and out.endswith(f"{page}\n") and page.is_file() and err == ""
    code, out, _ = run("report", exported, "--json")
    found = json.loads(out)
    assert found["html"] == str(page) and found["validation"]["settings"]["window"] == 32
    assert found["validation"]["versions"]["qexport"] == qexport.__version__
    code, out, _ = run("report", exported, exported)
    assert code == 0 and "0 of 14 linears have a lower own SQNR" in out
    assert out.endswith(f"The page: {exported / 'comparison.html'}\n") and (exported / "comparison.html").is_file()
    assert run("compare", exported, exported, "--html", tmp_path / "c.html")[1].startswith(out.partition("\n\nThe")[0])
    assert (tmp_path / "c.html").is_file()
    refused(run("report", exported, "--html", tmp_path / "c.html"), "--html", "Give two folders")
    code, out, _ = run("report", exported, exported, "--json")
    assert {p["difference"] for p in json.loads(out)["linears"]} == {0.0}
    refused(run("report", exported, never), "never validated")
    a_study((exported.name,)).save(study := tmp_path / "study.json")
    code, _, err = run("report", exported, "--study", study)
    assert code == 0 and err == "" and "Under sampling" in page.read_text()
    refused(run("report", exported, "--study", exported / "report.json"), "not a study", "qexport study -o")
    refused(run("report", exported, exported, "--study", study), "--study", "one folder")


_OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_own_code(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text(_OWN_CODE)
    return copy


def test_code_of_the_model_runs_only_when_asked_to(with_own_code, tmp_path, run):
    refused(run("inspect", with_own_code, "-r", "w4a16_g32_rtn"), "no config that transformers understands")
    assert run("inspect", with_own_code, "-r", "w4a16_g32_rtn", "--trust-remote-code")[0] == 0


@pytest.mark.slow
def test_each_command_asks_for_that_by_itself(with_own_code, tmp_path, run):
    out = tmp_path / "out"
    assert run("export", with_own_code, "-o", out, "-r", "w4a16_g32_rtn", "--trust-remote-code")[0] == 0
    few = ("--windows", 1, "--window", 8, "--greedy", 0)
    refused(run("validate", out, "--reference", with_own_code, *few), "no config that transformers understands")
    assert run("validate", out, "--reference", with_own_code, *few, "--trust-remote-code")[0] == 0
    short = ("--max-new-tokens", 2, "--temperature", 0, "--seed", 0)
    refused(run("study", out, "--reference", with_own_code, *short), "no config that transformers understands")
    assert run("study", out, "--reference", with_own_code, *short, "--trust-remote-code")[0] == 0


def test_the_schema_of_a_report(run):
    code, out, _ = run("report", "--schema")
    schema = json.loads(out)
    assert code == 0 and schema["properties"].keys() >= {"layers", "logits", "placement", "problems", "verdict"}
    assert "signal to quantization noise" in schema["$defs"]["ValueComparison"]["description"]


def test_an_export_has_a_model_card(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: onnxruntime\n") and "See the source model" in card


def test_generate_prints_the_text_and_nothing_else(exported, run):
    code, greedy, err = run("generate", exported, "--prompt", "abc", "--max-new-tokens", 8)
    assert code == 0 and greedy.endswith("\n") and err == ""
    assert run("generate", exported, "-p", "abc", "--max-new-tokens", 8, "--temperature", 0)[1] == greedy
    sampled = [
        run("generate", exported, "-p", "abc", "--max-new-tokens", 8, "--temperature", 5, "--seed", s)[1]
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_bench(exported, run):
    code, out, _ = run("bench", exported, "--prompt-length", 16, "--past", 8, "--repeats", 1, "--threads", 1, "--json")
    assert code == 0 and set(json.loads(out)["first"]["prefill"]) == {"16"}
    code, out, _ = run(
        "bench", exported, "--against", exported, "--prompt-length", 16, "--past", 8, "--repeats", 1, "--threads", 1
    )
    assert code == 0 and "first/second" in out and "prompt of 16 tokens" in out
    words = out.splitlines()[-1]
    assert "times as fast with 16 tokens" in words and "times as fast with 8 tokens in the cache" in words
    assert words.endswith("1.00 of the disk")
    refused(run("bench", exported, "--past", 10**6), "does not fit")


def test_recipes(run):
    code, out, _ = run("recipes", "list")
    assert code == 0 and all(name in out for name in qexport.Recipe.presets())
    assert out.index("smallest") < out.index("balanced") < out.index("closest") < out.index("crossquant_w8a8")
    code, out, _ = run("recipes", "show", "w8a8_static")
    assert code == 0 and "alpha: 0.8" in out and run("recipes", "show", "cnn")[1] == out


def test_a_shown_recipe_can_be_used(run, tmp_path):
    _, out, _ = run("recipes", "show", "w4a16_g32")
    (tmp_path / "mine.yaml").write_text(out)
    assert qexport.Recipe.load(tmp_path / "mine.yaml") == qexport.Recipe.load("w4a16_g32")


def test_doctor(run):
    code, out, _ = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert checks["CPUExecutionProvider"]["ok"]
    assert code == (0 if all(c["ok"] or c["optional"] for c in checks.values()) else 1)


def test_help_and_version_start_quickly():
    start = time.perf_counter()
    done = shell("--help")
    seconds = time.perf_counter() - start
    assert done.returncode == 0 and "inspect" in done.stdout
    modules = shell_modules("--version")
    assert "qexport.cli" in modules and "torch" not in modules and seconds < 5
    assert "torch" not in shell_modules("recipes", "list"), "descriptions are plain text"
    assert shell("--version").stdout.strip() == qexport.__version__


def test_a_shell_completes_commands_and_recipes():
    for words, wanted in (("qexport va", {"validate"}), ("qexport export m -r clo", {"closest"})):
        asked = {"_QEXPORT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [Path(sys.executable).with_name("qexport")]
        done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True)
        assert done.returncode == 0 and set(done.stdout.split()) == wanted


def shell_modules(*arguments: str) -> set[str]:
    """The modules that a command has imported when it ends."""
    code = f"import atexit, sys; sys.argv = ['qexport', *{arguments!r}]; atexit.register(lambda: print(*sys.modules))"
    command = [sys.executable, "-c", f"{code}; from qexport.cli import main; main()"]
    return set(subprocess.run(command, capture_output=True, text=True).stdout.split())
