"""How much a command says, and that a command is one file."""

import logging
import sys

import pytest

import qexport
from helpers.commands import Command
from helpers.random_decoders import save_model
from qexport.cli import commands
from qexport.cli.app import app

NO_TOKENIZER = "the model has no tokenizer that can be used, so the export will take token ids only"
NAMES = [("export",), ("inspect",), ("validate",), ("report",), ("study",), ("generate",), ("bench",), ("optimize",),
         ("doctor",), ("recipes", "list"), ("recipes", "show")]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


@pytest.fixture
def exported(run, model, tmp_path):
    """exported(*options) -> (stdout, stderr) of an export with smoothing, GPTQ and int8 activations."""

    def export(*options):
        data = ("--calibration", "random", "--samples", 2, "--sequence-length", 16)
        code, out, err = run("export", model, "-o", tmp_path / "out", "-r", "w4a8_g32", *data, *options)
        assert code == 0, err
        return out, err

    return export


def test_a_warning_is_said_once(exported):
    out, err = exported()
    assert err.count(f"warning: {NO_TOKENIZER}\n") == 1 and NO_TOKENIZER not in out
    assert "quantize 1/3 model.layers.0" in err and "GPTQ" not in err


def test_verbose_says_what_is_decided_and_why(exported):
    lines = exported("-v")[1].splitlines()
    assert "api.stages.planning: lm_head: float, kept in float by the recipe" in lines
    assert "passes.GPTQ: model.layers.0: 7 sites changed" in lines
    assert "passes.GPTQ: epilogue: lm_head left alone: kept in float by the recipe" in lines
    mlp = "model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj"
    assert f"lower.blocks: model.layers.0: {mlp} are one matmul" in lines
    assert any(line.startswith("calibrate.loop: model.layers.0: SQNR ") and line.endswith(" dB") for line in lines)
    assert not any("model.layers.0.mlp.down_proj: w4a8_g32" in line for line in lines)


def test_twice_verbose_says_the_details_too(exported):
    lines = exported("-vv")[1].splitlines()
    assert "passes.GPTQ: model.layers.0: 7 sites changed" in lines
    assert "passes.GPTQ: model.layers.0: model.layers.0.mlp.down_proj: w4a8_g32" in lines
    assert "api.stages.planning: model.layers.0.mlp.down_proj: w4a8_g32" in lines


def test_quiet_leaves_results_and_errors(exported, run, model, tmp_path):
    out, err = exported("--quiet")
    assert err == "" and "6 of 7" not in out and "7 of 8 linears quantized" in out
    code, out, err = run("inspect", model, "-r", "w4a17", "-q")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_the_next_command_of_a_process_starts_anew(exported, run, model):
    exported("-q")
    assert f"warning: {NO_TOKENIZER}" in run("inspect", model)[2]


@pytest.mark.parametrize("name", NAMES, ids=" ".join)
def test_every_command_takes_them(run, name):
    code, out, _ = run(*name, "--help")
    assert code == 0 and "--verbose" in out and "--quiet" in out


def logging_of_the_library():
    ours = logging.getLogger("qexport")
    print(qexport.Recipe.__name__, qexport.export.__name__, ours.handlers, ours.level, ours.propagate)
    print(logging.getLogger().handlers)


def test_the_library_configures_no_logging(tmp_path):
    done = Command(tmp_path, work=logging_of_the_library)
    assert (done.wait(), done.stdout) == (0, "Recipe export [] 0 True\n[]\n"), done.stderr


def test_a_command_is_one_file(run, tmp_path, monkeypatch):
    (tmp_path / "greet.py").write_text('''
from qexport.cli.app import RUN, command
from qexport.cli.options import Json
from qexport.log import is_quiet

@command(RUN)
def greet(name: str, as_json: Json = False) -> None:
    """Say hello."""
    print(f"hello {name}", is_quiet(), as_json)
''')
    before = [*app.registered_commands]
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    try:
        assert run("greet", "you", "-q", "--json") == (0, "hello you True True\n", "")
        assert "Say hello." in run("--help")[1]
    finally:
        app.registered_commands[:] = before
        sys.modules.pop(f"{commands.__name__}.greet", None)
