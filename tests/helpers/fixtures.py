"""What the tests of all rooms are given."""

import signal
import sys
from functools import cache, partial

import onnxruntime as ort
import pytest
import torch
import transformers

import qexport
from helpers import breadth, exports, traces
from helpers.cuda_placement.build import CannotBuild, build_stand_ins
from helpers.cuda_placement.probe import placement
from helpers.random_decoders import save_model
from helpers.tokenizer_files import LETTERS, write_word_tokenizer
from qexport import cli
from qexport.artifact import checksums
from qexport.recipe.recipe import Recipe
from qexport.targets import cpu

transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # models here are so small that threads cost more than they bring
_start = ort.InferenceSession.__init__


def _on_one_thread(self, path_or_bytes, sess_options=None, *args, **named):
    """The same of sessions whose options say nothing: threads that wait for work are busy doing so."""
    options = ort.SessionOptions() if sess_options is None else sess_options
    if not options.intra_op_num_threads:
        options.intra_op_num_threads = 1
    _start(self, path_or_bytes, options, *args, **named)


ort.InferenceSession.__init__ = _on_one_thread


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(config, items):
    breadth.mark_by_default(items, whole=not any("::" in argument for argument in config.args))
    breadth.mark_combinations(items)
    breadth.mark_siblings(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A model is traced once, but for the tests of that."""
    with traces.anew() if item.get_closest_marker("traced_anew") else traces.remembered():
        return (yield)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """model_folder(family): the folder of a small random model, made once; not to be written to."""
    return cache(lambda family: save_model(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="session")
def model_with_tokenizer(tmp_path_factory):
    """The folder of a small random Llama with a tokenizer; not to be written to."""
    folder = save_model("llama", tmp_path_factory.mktemp("model") / "tiny", vocab_size=LETTERS)
    write_word_tokenizer(folder, LETTERS)
    return folder


@pytest.fixture(scope="session")
def export_folder(model_folder, tmp_path_factory):
    """export_folder(family, recipe, **options): the folder of an export, made once; not to be written to."""
    made = {}

    def export(family, recipe, **options):
        recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        asked = family, recipe.to_yaml(), *sorted(options.items())
        if asked not in made:
            out = tmp_path_factory.mktemp("exports") / family
            made[asked] = qexport.export(model_folder(family), recipe, out_dir=out, **options).folder
        return made[asked]

    yield export
    assert {folder.name: changed for folder in made.values() if (changed := checksums.changed(folder))} == {}


@pytest.fixture(scope="session")
def captured(model_folder):
    """captured(family): a copy of its captured graph, for the caller to change."""

    once = cache(lambda family: exports.capture(model_folder(family)))
    return lambda family: once(family).copy()


@pytest.fixture(scope="session")
def cuda_placement(tmp_path_factory):
    """`placement` on stand-in CUDA libraries: cuda_placement(model_path, session_entries, dims=None)."""
    try:
        return partial(placement, env=build_stand_ins(tmp_path_factory.mktemp("cuda_stand_ins")))
    except CannotBuild as reason:
        pytest.skip(str(reason))


@pytest.fixture
def hears_signals():
    """As in a terminal: a shell starts what runs in its background with interrupts ignored."""
    hears = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in hears.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr), in this process."""

    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["qexport", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        done = capsys.readouterr()
        return code, done.out, done.err

    return run_command


@pytest.fixture
def all_convolutions(monkeypatch):
    """Convolutions become integers though they are small, and slower than float."""
    monkeypatch.setattr(cpu, "slower_than_float", lambda shape, groups: "")
