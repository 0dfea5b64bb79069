"""A conversation: what is remembered, what is forgotten, and what Ctrl-C leaves."""

import io
import sys

import pytest

import qexport
from helpers.onnx_decoder import write_talking_decoder
from qexport.errors import InputError

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}a"
CONTEXT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_talking_decoder(tmp_path_factory.mktemp("chat"), TEMPLATE, CONTEXT)


def roles(talk):
    return [turn["role"] for turn in talk.turns]


def test_an_answer_depends_on_what_was_said_before(folder):
    talk, pieces = qexport.Chat(folder, max_new_tokens=4), []
    first = talk.say("bcd", pieces.append)
    assert first == "".join(pieces) and first == qexport.generate(folder, "bcd", chat=True, max_new_tokens=4)[0]
    second = talk.say("bcd")
    assert roles(talk) == ["user", "assistant"] * 2 and talk.turns[1]["content"] == first
    whole = f"ubcda{first}ubcda"
    assert second == qexport.generate(folder, whole, max_new_tokens=4)[0]
    talk.forget()
    assert talk.turns == [] and talk.say("bcd") == first


def test_the_oldest_turns_go_where_there_is_no_room_and_the_system_stays(folder):
    talk = qexport.Chat(folder, system="xyz", max_new_tokens=4)
    for _ in range(6):
        talk.say("bcdefg")
    assert roles(talk)[0] == "system" and len(talk.turns) < 13
    with pytest.raises(InputError, match="leave no room for an answer of 4: a conversation has 40 at most"):
        talk.say("b" * CONTEXT)


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(folder):
    talk, pieces = qexport.Chat(folder, max_new_tokens=8), []

    def stop(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("bcd", stop)
    assert roles(talk) == ["user", "assistant"] and talk.turns[1]["content"] == "".join(pieces)
    assert talk.say("e")


def test_the_command_line_reads_line_after_line(run, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("bcd\n\n/forget\nbcd\n"))
    code, out, err = run("chat", folder, "--max-new-tokens", "4", "--quiet")
    first, second = out.splitlines()
    assert code == 0 and first == second != "" and err == ""
