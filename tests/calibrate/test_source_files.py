"""Calibration samples out of files of token ids and of conversations, and packed ones."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import qexport
from helpers.tokenizer_files import BYTE_BOS, byte_tokenizer
from qexport.calibrate.sources import check_source, load_samples
from qexport.calibrate.sources.kinds import token_file
from qexport.errors import InputError
from qexport.recipe.recipe import CalibrationSpec, Recipe

BOS, EOS, VOCAB = BYTE_BOS, 257, 300
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with user') }}{% endif %}x"


def spec(source="self", samples=4, sequence_length=16, **more):
    return CalibrationSpec(source=str(source), samples=samples, sequence_length=sequence_length, **more)


def load(source, vocab_size=VOCAB, tokenizer=None, **more):
    return load_samples(spec(source, **more), tokenizer=tokenizer, vocab_size=vocab_size)


@pytest.fixture
def tokenizer():
    made = byte_tokenizer(bos=True)
    made.add_special_tokens({"eos_token": "</s>"})
    made.chat_template = TEMPLATE
    assert made.eos_token_id == EOS
    return made


# --- token ids


def write_ids(path, ids):
    match path.suffix:
        case ".npy":
            np.save(path, ids)
        case ".bin":
            ids.astype("<i4").tofile(path)
        case ".safetensors":
            save_file({"input_ids": torch.from_numpy(ids)}, path)
    return path


@pytest.mark.parametrize("name", ["ids.npy", "ids.bin", "ids.safetensors"])
def test_one_long_text_of_ids_is_cut_into_windows(name, tmp_path):
    path = write_ids(tmp_path / name, np.arange(1000, dtype=np.int32))
    samples = load(path, vocab_size=1000)
    assert samples.input_ids.dtype == torch.int64 and samples.attention_mask.eq(1).all()
    begins = samples.input_ids[:, 0].tolist()
    assert samples.input_ids.tolist() == [list(range(b, b + 16)) for b in begins]
    assert all(b % 16 == 0 and i * 62 // 4 <= b // 16 < (i + 1) * 62 // 4 for i, b in enumerate(begins))
    assert samples.described == f"4 of 62 sequences of 16 tokens from {name} (seed 0)"
    assert load(path, vocab_size=1000, seed=1).input_ids[:, 0].tolist() != begins


@pytest.mark.parametrize("name", ["ids.npy", "ids.safetensors"])
def test_rows_of_ids_are_taken_from_all_over_the_file(name, tmp_path):
    path = write_ids(tmp_path / name, np.arange(8 * 20, dtype=np.int64).reshape(8, 20))
    samples = load(path, vocab_size=1000)
    assert samples.input_ids.shape == (4, 16)
    rows = [first // 20 for first in samples.input_ids[:, 0].tolist()]
    assert [row // 2 for row in rows] == [0, 1, 2, 3]
    assert load(path, vocab_size=1000, samples=9).described == (
        f"8 of 8 sequences of 16 tokens from {name} (seed 0, 9 asked for)"
    )


def test_padding_in_a_file_is_moved_to_the_left(tmp_path):
    ids, mask = torch.tensor([[5, 6, -100], [7, 8, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "a.safetensors")
    samples = load(tmp_path / "a.safetensors", samples=2)
    assert samples.input_ids.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert samples.attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_no_more_of_a_large_file_is_read_than_is_taken(tmp_path, monkeypatch):
    """A terabyte of zeros that has no blocks on the disk: to read it would take hours."""
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    read = []
    real = token_file._mapped

    def watched(array, where):
        table = real(array, where)
        return token_file._Table(table.shape, lambda b, e: read.append(e - b) or table.ids(b, e))

    monkeypatch.setattr(token_file, "_mapped", watched)
    samples = load(path, samples=50)
    assert samples.input_ids.shape == (50, 16) and read == [16] * 50
    assert samples.described.startswith("50 of 17,179,869,184 sequences")


@pytest.mark.parametrize(
    ("name", "made", "message"),
    [
        ("a.npy", np.zeros((4, 16), np.float32), r"a\.npy: it holds float32, not integers\. Save token"),
        ("a.npy", np.zeros((2, 2, 2), np.int32), r"its ids are \[2, 2, 2\]"),
        ("a.npy", np.zeros((0, 16), np.int32), "it holds no tokens"),
        ("a.npy", np.zeros(15, np.int32), "its 15 tokens are fewer than one sample of 16"),
        ("a.npy", np.full((4, 16), VOCAB), f"tokens from a.npy .*: token id {VOCAB} is outside the"),
        ("a.npy", b"", "it holds no tokens"),
        ("a.npy", b"no numbers", "cannot be read as token ids"),
        ("a.npy", np.array([{}]), "cannot be read as token ids"),
        ("a.bin", b"\0" * 70, "70 bytes are not a whole number of int32"),
        ("a.bin", b"", "it holds no tokens"),
        ("a.bin", np.arange(64, dtype=np.uint16).tobytes(), r"token id \d{5,} is outside"),
        ("a.safetensors", b"", "it holds no tokens"),
        ("a.safetensors", b"no tensors", "cannot be read as token ids"),
        ("a.safetensors", {"x": torch.zeros(4, 16)}, "it holds F32, not integers"),
        ("a.safetensors", {"x": torch.zeros(4), "y": torch.zeros(4)}, "holds 2 tensors, but no input_ids"),
        ("a.safetensors", {}, "holds no tensors"),
        ("a.safetensors", {"input_ids": torch.ones(2, 3).int(), "attention_mask": torch.ones(2)}, "another shape"),
    ],
)  # fmt: skip
def test_unusable_files_of_ids(name, made, message, tmp_path):
    path = tmp_path / name
    if isinstance(made, bytes):
        path.write_bytes(made)
    elif isinstance(made, dict):
        save_file(made, path)
    else:
        np.save(path, made)
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert str(caught.value).count("\n") == 0


def test_a_missing_file_of_ids_is_noticed_before_the_work(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        check_source(spec(tmp_path / "gone.npy"), None)
    write_ids(tmp_path / "a.npy", np.zeros(64, np.int32))
    check_source(spec(tmp_path / "a.npy"), None)  # no tokenizer is needed


# --- conversations


def chat(i, answer=""):
    return [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": answer or f"answer {i}"}]


def chats(path, n=8):
    path.write_text("".join(json.dumps({"messages": chat(i)}) + "\n" for i in range(n)))
    return path


def test_conversations_go_through_the_models_own_template(tmp_path, tokenizer):
    samples = load(chats(tmp_path / "chats.jsonl"), tokenizer=tokenizer, sequence_length=64)
    texts = [tokenizer.decode(row[mask == 1]) for row, mask in zip(*vars_of(samples), strict=True)]
    numbers = [int(text[7]) for text in texts]
    assert texts == [f"<user>q{i}\n<assistant>answer {i}\n" for i in numbers]
    assert [i // 2 for i in numbers] == [0, 1, 2, 3]
    assert samples.described == "4 conversations of up to 29 tokens from chats.jsonl (seed 0)"


def vars_of(samples):
    return samples.input_ids, samples.attention_mask


def test_given_conversations_are_samples(tokenizer):
    samples = load_samples(spec(sequence_length=64), [chat(0), chat(1, "x")], tokenizer=tokenizer, vocab_size=VOCAB)
    assert tokenizer.decode(samples.input_ids[0]) == "<user>q0\n<assistant>answer 0\n"
    assert samples.attention_mask.sum(1).tolist() == [29, 22]


def test_packed_conversations_fill_every_window(tmp_path, tokenizer):
    path = chats(tmp_path / "chats.jsonl")
    samples = load(path, tokenizer=tokenizer, packed=True)
    assert samples.input_ids.shape == (4, 16) and samples.attention_mask.eq(1).all()
    text = tokenizer.decode(samples.input_ids.flatten())
    assert text.count("</s>") == 2 and text.split("</s>")[1].startswith("<user>q")
    assert samples.described == "4 windows of 16 tokens packed from chats.jsonl (seed 0)"
    assert not torch.equal(samples.input_ids, load(path, tokenizer=tokenizer, packed=True, seed=1).input_ids)
    # Each takes 30 tokens with its end: all are 240, 15 windows.
    assert load(path, tokenizer=tokenizer, packed=True, samples=99).input_ids.shape == (15, 16)


def test_packed_texts_have_the_end_of_a_text_between(tokenizer):
    texts = ["abc", "defgh"]
    samples = load_samples(spec(sequence_length=5, packed=True), texts, tokenizer=tokenizer, vocab_size=VOCAB)
    ids = [BOS, *tokenizer("abc").input_ids[1:], EOS, BOS, *tokenizer("defgh").input_ids[1:], EOS]
    assert samples.input_ids.flatten().tolist() == ids[:10]
    assert samples.described == "2 windows of 5 tokens, packed of 2 texts, given"


def test_a_packed_text_begins_once(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x" * 63)
    samples = load(tmp_path / "a.txt", tokenizer=tokenizer, packed=True)
    assert samples.input_ids.eq(BOS).sum() == 1 and samples.input_ids[0, 0] == BOS


def test_a_data_set_of_conversations(tmp_path, tokenizer, monkeypatch):
    package = pytest.importorskip("datasets")
    rows = [{"messages": chat(i)} for i in range(3)]
    monkeypatch.setattr(package, "load_dataset", lambda **asks: iter(rows))
    samples = load("datasets:some/chats:train:messages", tokenizer=tokenizer, samples=2, sequence_length=64)
    assert [tokenizer.decode(row) for row in samples.input_ids] == [
        f"<user>q{i}\n<assistant>answer {i}\n" for i in range(2)
    ]
    packed = load("datasets:some/chats:train:messages", tokenizer=tokenizer, packed=True)
    assert packed.input_ids.shape == (4, 16) and packed.attention_mask.eq(1).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "it holds no conversations"),
        ("{", r"line 1 is not JSON \(.*\)\. A line is"),
        ('{"text": "a"}', r"line 1 has no messages\. .*datasets:FILE:train:COLUMN"),
        ('{"messages": []}', r"a\.jsonl, line 1: holds no messages"),
        ('{"messages": [{"content": "a"}]}', "a message has no role"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "chat template refuses it .*begin with user"),
    ],
)
def test_unusable_conversations(line, message, tmp_path, tokenizer):
    tokenizer.chat_template = STRICT
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "a.jsonl", tokenizer=tokenizer)


def test_what_conversations_and_packing_need(tmp_path, tokenizer):
    path = chats(tmp_path / "chats.jsonl")
    with pytest.raises(InputError, match="text needs a tokenizer"):
        load(path)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"chats\.jsonl, line \d: the tokenizer has no chat template"):
        load(path, tokenizer=tokenizer)
    without = byte_tokenizer()
    without.chat_template = TEMPLATE
    with pytest.raises(InputError, match=r"no token for the end of a text\. Set packed: false"):
        load(path, tokenizer=without, packed=True)
    with pytest.raises(InputError, match="cannot be packed again"):
        load(write_ids(tmp_path / "a.npy", np.zeros(64, np.int32)), packed=True)
    with pytest.raises(InputError, match="cannot read the calibration text: No such file"):
        check_source(spec(tmp_path / "gone.jsonl"), SimpleNamespace())


def test_an_export_calibrates_on_a_file_of_ids(tmp_path, model_folder):
    """Of a model without a tokenizer."""
    path = write_ids(tmp_path / "ids.npy", np.arange(64, dtype=np.uint16).reshape(4, 16))
    recipe = Recipe(scheme="w8a8_static", calibration=spec(samples=2))
    made = qexport.export(model_folder("llama"), recipe, out_dir=tmp_path / "out", calibration=path)
    assert made.calibration == "2 of 4 sequences of 16 tokens from ids.npy (seed 0)"
    with pytest.raises(InputError, match="there is no such file"):
        qexport.export(model_folder("llama"), recipe, out_dir=tmp_path / "other", calibration=tmp_path / "gone.npy")
    assert not (tmp_path / "other").exists()
