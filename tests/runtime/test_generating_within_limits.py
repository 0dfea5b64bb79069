"""Prompts, chats and lengths that do not fit are one sentence, and what was written stays."""

import string

import pytest
from transformers import AutoTokenizer

from helpers.onnx_decoder import write_talking_decoder
from qexport.errors import InputError
from qexport.runtime.generate import generate_text

CONTEXT = 16
STRICT = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('A system message is needed') }}{% endif %}"
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_talking_decoder(tmp_path_factory.mktemp("decoder"), STRICT, CONTEXT)


def words(count):
    """Letters, each of which is a token."""
    return string.ascii_letters[:count]


def test_a_prompt_that_fills_the_context_is_refused_with_the_limit(folder):
    with pytest.raises(InputError, match="its 16 tokens leave no room: the model reads at most 16. Shorten it to 15"):
        generate_text(folder, words(CONTEXT))


def test_text_ends_where_the_context_ends(folder, caplog):
    pieces = []
    texts = generate_text(folder, words(10), max_new_tokens=50, on_text=lambda row, piece: pieces.append(piece))
    assert caplog.messages == ["stopped after 6 new tokens, where the model's context of 16 tokens ends"]
    assert texts == ["".join(pieces)] and texts == generate_text(folder, words(10), max_new_tokens=6)


def test_a_template_that_refuses_is_quoted_and_a_system_message_helps(folder):
    with pytest.raises(InputError, match=r"refuses these messages \(A system message is needed\).*pass --system"):
        generate_text(folder, "b", chat=True)
    with_system = generate_text(folder, "b", chat=True, system="a", max_new_tokens=3)
    assert with_system == generate_text(folder, "ab", max_new_tokens=3)
    with pytest.raises(InputError, match="part of a chat. Pass --chat"):
        generate_text(folder, "b", system="a")


def test_a_template_that_never_ends_is_stopped(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("qexport.runtime.generate._PATIENCE", 0.5)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for file in folder.iterdir():
        if file.suffix != ".jinja":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(endless)
    with pytest.raises(InputError, match="it takes longer than 0.5 seconds"):
        generate_text(tmp_path, "b", chat=True)


def test_a_token_without_a_row_is_refused(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file) if "token" not in file.name else None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the tokenizer gives token 97, but the model knows 97 tokens"):
        generate_text(tmp_path, "b<new>")


def test_the_command_line_keeps_what_was_written(run, folder):
    code, out, err = run("generate", folder, "-p", words(12), "--max-new-tokens", "99")
    assert code == 0 and out.endswith("\n") and len(out.strip()) > 0
    assert err == "warning: stopped after 4 new tokens, where the model's context of 16 tokens ends\n"
