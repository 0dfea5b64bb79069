"""The code in the card of an export, as whoever copies it runs it: genai reads the tokens that transformers reads."""

import re

import pytest
from transformers import AutoTokenizer

from helpers.random_decoders import save_model
from helpers.tokenizer_files import save_tokenizer
from qexport.api.exporting import export
from qexport.report.card import CARD_FILE
from qexport.runtime.decoder import open_decoder

LENGTH = 90  # tokens that the model reads, fewer than the card would ask for


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return save_model("llama", folder, vocab_size=400, max_position_embeddings=LENGTH)


def run(code: str, names: dict) -> tuple[int, ...]:
    """The tokens of the text that the card's code writes."""
    exec(code, names)
    return tuple(map(int, names["generator"].get_sequence(0)))


@pytest.mark.by_default("True-bytes", "False-spaces")
@pytest.mark.parametrize("kind", ["bytes", "spaces"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_code_for_genai_reads_and_writes_the_right_tokens(model, tmp_path, monkeypatch, kind, adds_bos):
    pytest.importorskip("onnxruntime_genai")
    source = save_tokenizer(tmp_path / "source", kind, adds_bos=adds_bos)
    for path in model.iterdir():
        (source / path.name).symlink_to(path)
    folder = export(source, "w4a16_g32_rtn", out_dir=tmp_path / "out").folder
    monkeypatch.chdir(folder)
    blocks = re.findall("```python\n(.*?)```", (folder / CARD_FILE).read_text(), re.DOTALL)
    text, chat = (block for block in blocks if "generator" in block)
    tokenizer, names = AutoTokenizer.from_pretrained(source), {}

    prompt = tokenizer("The moon has phases because")["input_ids"]
    assert (prompt[0] == tokenizer.bos_token_id) is adds_bos, "what this test is about"
    messages = [{"role": "user", "content": "Why does the moon have phases?"}]
    question = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    for code, ids in ((text, prompt), (chat, question)):
        found = run(code, names)
        assert found[: len(ids)] == tuple(ids)
        decoder = open_decoder(folder, threads=1, max_length=LENGTH)
        written = decoder.generate([ids], max_new_tokens=LENGTH - len(ids), eos_token_ids=[2]).tokens[0]
        assert found[len(ids) :] == written[: len(found) - len(ids)] and len(found) > len(ids)
