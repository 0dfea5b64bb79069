"""onnxruntime-genai loads what `export` writes, as it is, and writes the same greedy text as our own loop."""

import pytest

from qexport.export import export
from qexport.runtime.decoder import open_decoder
from tiny_decoder import write_word_tokenizer

NEW = 10


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", "w4a16_g32_rtn"), ("llama", "w8a8_dyn"), ("qwen2", "w4a8_g128"), ("mistral", "w8a8_static")],
)
def test_same_greedy_tokens(model_folder, tmp_path, family, recipe):
    og = pytest.importorskip("onnxruntime_genai")
    folder = export(model_folder(family), recipe, out_dir=tmp_path / "out", calibration="random").folder
    write_word_tokenizer(folder)
    prompt = [5, 6, 7, 11, 3]
    expected = open_decoder(folder, threads=1).generate([prompt], max_new_tokens=NEW).tokens[0]
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + NEW, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = tuple(map(int, generator.get_sequence(0)[len(prompt) :]))
    assert found == tuple(expected)[: len(found)] and len(found) >= 1
