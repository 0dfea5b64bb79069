"""The tokenizer files of an export: the source's, and a config of which every reader makes the same."""

import json
import shutil

import huggingface_hub
import pytest
from transformers import AutoTokenizer, BertTokenizer

from helpers.tokenizer_files import CHAT, save_tokenizer
from qexport.artifact.tokenizer import CONFIG, TEMPLATE, WHOLE, write_tokenizer
from qexport.models.tokenizers import load_tokenizer

TEXTS = ("The moon has phases.", " Hello  you , hello !", "\u00fcml\u00e4ut \u6f22 \U0001f916\n\ttab", "")


def config_of(folder) -> dict:
    return json.loads((folder / CONFIG).read_text())


def change(folder, **values):
    """Set keys of tokenizer_config.json; None takes one away."""
    config = config_of(folder) | values
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def written(source, out):
    out.mkdir()
    tokenizer = load_tokenizer(source)
    write_tokenizer(tokenizer, source, out)
    again = load_tokenizer(out)
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert again.chat_template == tokenizer.chat_template
    return config_of(out)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_what_transformers_5_alone_writes_is_said_so_that_others_read_it(tmp_path, adds_bos):
    source = save_tokenizer(tmp_path / "source", adds_bos=adds_bos)
    change(source, extra_special_tokens=["<unk>"])
    assert config_of(source)["tokenizer_class"] == "TokenizersBackend", "what this test is about"
    config = written(source, tmp_path / "out")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["clean_up_tokenization_spaces"] is False
    assert config["additional_special_tokens"] == ["<unk>"] and "extra_special_tokens" not in config
    assert config["chat_template"] == CHAT and (tmp_path / "out" / TEMPLATE).read_text() == CHAT
    assert "is_local" not in config and "local_files_only" not in config
    assert (tmp_path / "out" / WHOLE).read_bytes() == (source / WHOLE).read_bytes()


def test_files_on_which_readers_agree_stay_as_they_are(tmp_path):
    source = save_tokenizer(tmp_path / "source", adds_bos=True)
    change(
        source, tokenizer_class="PreTrainedTokenizerFast", chat_template=CHAT, is_local=None, local_files_only=None,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    (source / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    written(source, tmp_path / "out")
    assert {path.name for path in source.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    for path in source.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_template_in_the_config_alone_gets_its_file_and_several_get_theirs(tmp_path):
    source = save_tokenizer(tmp_path / "source", adds_bos=False, chat=None)
    change(source, chat_template=CHAT)
    assert written(source, tmp_path / "out")["chat_template"] == CHAT
    assert (tmp_path / "out" / TEMPLATE).read_text() == CHAT
    several = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "{{ tools }}"}]
    change(source, chat_template=several)
    assert written(source, tmp_path / "two")["chat_template"] == several
    assert (tmp_path / "two" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


@pytest.mark.parametrize(
    ("adds_bos", "stated", "said"),
    [(False, None, False), (False, True, False), (False, False, False), (True, None, None), (True, False, True)],
)
def test_classes_that_add_a_token_unasked_are_told_what_is_right(tmp_path, adds_bos, stated, said):
    source = save_tokenizer(tmp_path / "source", "spaces", adds_bos=adds_bos)
    change(source, tokenizer_class="LlamaTokenizer", add_bos_token=stated)
    config = written(source, tmp_path / "out")
    assert config["tokenizer_class"] == "LlamaTokenizer" and config.get("add_bos_token") is said


def test_a_vocabulary_without_tokenizer_json_gets_one(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "moon", "has", "phases", "."]
    (source / "vocab.txt").write_text("\n".join(words))
    (source / CONFIG).write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    assert written(source, tmp_path / "out")["tokenizer_class"] == "BertTokenizer"
    assert (tmp_path / "out" / WHOLE).is_file()
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (source / "vocab.txt").read_bytes()
    expected = BertTokenizer.from_pretrained(source)("The moon")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("The moon")["input_ids"] == expected == [2, 5, 6, 3]


def with_code(folder):
    save_tokenizer(folder, adds_bos=True)
    auto = {"AutoTokenizer": ["tokenization_mine.MineTokenizer", None]}
    change(folder, auto_map=auto, tokenizer_class="MineTokenizer")
    (folder / "tokenization_mine.py").write_text("raise SystemExit('code of a stranger ran')\n")
    return folder


def test_code_that_is_not_trusted_does_not_cost_the_tokenizer(tmp_path, caplog):
    source = with_code(tmp_path / "source")
    plain = save_tokenizer(tmp_path / "plain", adds_bos=True)
    config = written(source, tmp_path / "out")
    assert f"{source}: its tokenizer is read without code" in caplog.text
    assert "auto_map" not in config and config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not (tmp_path / "out" / "tokenization_mine.py").exists()
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found("The moon")["input_ids"] == AutoTokenizer.from_pretrained(plain)("The moon")["input_ids"]
    assert found.bos_token == "<s>" and found.chat_template == CHAT


def test_a_tokenizer_that_is_nothing_but_code_is_said_to_be_left_out(tmp_path, caplog):
    source = with_code(tmp_path / "source")
    (source / WHOLE).unlink()
    assert load_tokenizer(source) is None and load_tokenizer(source) is None
    assert caplog.text.count("code of its own, left out here: --trust-remote-code runs it") == 1
    shutil.rmtree(source)
    source.mkdir()
    assert load_tokenizer(source) is None, "no tokenizer at all"


def test_being_offline_changes_no_byte(tmp_path, monkeypatch):
    source = save_tokenizer(tmp_path / "source", adds_bos=True)
    (source / CONFIG).unlink()  # so that transformers makes it up
    found = []
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)  # what it read of the environment
        assert huggingface_hub.is_offline_mode() is offline
        (out := tmp_path / str(offline)).mkdir()
        write_tokenizer(load_tokenizer(source), source, out)
        found.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert found[0] == found[1] and CONFIG in found[0]
