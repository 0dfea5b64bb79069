"""Every block of the tutorials, as it stands there, on small models in the place of those that a reader has."""

import re
import shlex
from pathlib import Path

import pytest

from helpers.random_decoders import save_model
from helpers.random_modules import save_seq2seq
from helpers.tokenizer_files import CHAT, save_tokenizer, write_word_tokenizer

TUTORIALS = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.md"))
WORDS = 97


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """What the tutorials find where they begin: models and texts."""
    save_tokenizer(save_model("llama", tmp_path / ".cache" / "smollm2", vocab_size=400), adds_bos=True, chat=CHAT)
    write_word_tokenizer(save_seq2seq("t5", tmp_path / ".cache" / "t5"), WORDS)
    (tmp_path / "text.txt").write_text(100 * "What the moon is made of, nobody knows.\n")
    (tmp_path / "other.txt").write_text(100 * "The sun is a star, and not a large one.\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_from_top_to_bottom(page, run, desk):
    names: dict = {"__name__": "tutorial"}
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks and {kind for kind, _ in blocks} <= {"sh", "python"}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, str(page), "exec"), names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "qexport"
            code, _, said = run(*arguments)
            assert code == 0, f"{line}\n{said}"
