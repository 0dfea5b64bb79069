import json

import numpy as np
import pytest

from helpers.onnx_decoder import ACCURACY, EOS, write_tiny_decoder
from helpers.tokenizer_files import write_word_tokenizer
from qexport.errors import InputError
from qexport.runtime.decoder import open_decoder
from qexport.runtime.genai import genai_config, model_type

NEW = 12


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genai")
    manifest = write_tiny_decoder(folder)
    write_word_tokenizer(folder)
    return folder, manifest, json.loads((folder / "config.json").read_text())


def test_tokens_and_search_come_from_the_generation_config_first(export):
    _, manifest, config = export
    found = genai_config(manifest, config, {"eos_token_id": [2, 5], "do_sample": True, "top_p": 0.9, "top_k": None})
    assert found["model"]["eos_token_id"] == [2, 5]
    assert (found["model"]["bos_token_id"], found["model"]["pad_token_id"]) == (1, 0)
    assert (found["search"]["do_sample"], found["search"]["top_p"], found["search"]["top_k"]) == (True, 0.9, 50)
    assert found["search"]["past_present_share_buffer"] is False
    assert genai_config(manifest, config | {"bos_token_id": None})["model"].get("bos_token_id", "absent") == "absent"
    assert genai_config(manifest, config | {"pad_token_id": None})["model"]["pad_token_id"] == EOS


@pytest.mark.parametrize(("stated", "taken"), [(0, 97), (98, 97), (None, 50), (5, 5)])
def test_top_k_means_what_it_means_to_transformers(export, stated, taken):
    _, manifest, config = export
    assert genai_config(manifest, config, {"top_k": stated})["search"]["top_k"] == taken


def first_tokens(folder, config, **search) -> set[int]:
    """The first token that genai draws, of 40 seeds; 0 where it is the end of the text."""
    og = pytest.importorskip("onnxruntime_genai")
    config["search"] |= {"do_sample": True, **search}
    (folder / "genai_config.json").write_text(json.dumps(config))
    model, found = og.Model(str(folder)), set()
    for seed in range(40):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=8, random_seed=seed)
        generator = og.Generator(model, parameters)
        generator.append_tokens([5, 6, 7])
        generator.generate_next_token()
        found.add(int([*generator.get_sequence(0), 0][3]))
    return found


def test_all_tokens_are_drawn_from_where_the_model_asks_for_it(export):
    folder, manifest, config = export
    whole = first_tokens(folder, genai_config(manifest, config, {"top_k": 0}))
    few = first_tokens(folder, genai_config(manifest, config, {"top_k": 2}))
    assert len(few) == 2 and len(whole) > 20
    with pytest.raises(RuntimeError, match="less than or equal to vocab_size"):
        first_tokens(folder, genai_config(manifest, config), top_k=98)


def test_padding_on_the_left_counts_as_tokens_in_genai(export):
    folder, manifest, config = export
    prompts = [[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]]
    found = run_genai(folder, genai_config(manifest, config), prompts)[1]
    padded = open_decoder(folder).generate([[0, 0, 5, 6, 7]], max_new_tokens=NEW, eos_token_ids=[EOS]).tokens[0]
    right = open_decoder(folder).generate([[5, 6, 7]], max_new_tokens=NEW, eos_token_ids=[EOS]).tokens[0]
    assert found[0] == padded != right


def test_session_entries_lie_flat_beside_the_named_options_and_cuda_names_its_provider(export):
    _, manifest, config = export
    session = {ACCURACY: "0", "ep.cuda.fpa_intb_gemm": "1"}
    made_for_cuda = manifest.model_copy(update={"session": session, "genai_provider_options": ({"cuda": {}},)})
    options = genai_config(made_for_cuda, config)["model"]["decoder"]["session_options"]
    assert {key: options[key] for key in session} == session
    assert options["provider_options"] == [{"cuda": {}}]


def test_sizes_of_a_nested_text_config_are_found(export):
    _, manifest, config = export
    nested = {"model_type": "gemma3", "text_config": config | {"model_type": "gemma3_text"}}
    assert genai_config(manifest, nested)["model"]["type"] == "gemma3_text"


def test_missing_facts_are_input_errors(export):
    _, manifest, config = export
    with pytest.raises(InputError, match="eos_token_id"):
        genai_config(manifest, config | {"eos_token_id": None})
    with pytest.raises(InputError, match="hidden_size is missing"):
        genai_config(manifest, {key: value for key, value in config.items() if key != "hidden_size"})
    with pytest.raises(InputError, match="this export is a module"):
        genai_config(manifest.model_copy(update={"kind": "module"}), config)
    with pytest.raises(InputError, match="not configured for the target abacus"):
        genai_config(manifest.model_copy(update={"target": "abacus", "genai_provider_options": None}), config)


def run_genai(folder, config, prompts):
    og = pytest.importorskip("onnxruntime_genai")
    (folder / "genai_config.json").write_text(json.dumps(config))
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    length = len(prompts[0])
    parameters.set_search_options(max_length=length + NEW, batch_size=len(prompts), do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompts, np.int32) if len(prompts) > 1 else prompts[0])
    while not generator.is_done():
        generator.generate_next_token()
    return model, tuple(tuple(map(int, generator.get_sequence(row)[length:])) for row in range(len(prompts)))


@pytest.mark.parametrize("name", ["llama", "a_model_of_next_year", "gpt2", "lfm2"])
def test_genai_generates_the_same_greedy_tokens_whatever_the_model_type(export, name):
    folder, manifest, config = export
    expected = open_decoder(folder).generate([[5, 6, 7]], max_new_tokens=NEW, eos_token_ids=[EOS]).tokens
    assert run_genai(folder, genai_config(manifest, config | {"model_type": name}), [[5, 6, 7]])[1] == expected


def test_genai_generates_the_same_for_a_batch(export):
    folder, manifest, config = export
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    expected = open_decoder(folder).generate(prompts, max_new_tokens=NEW, eos_token_ids=[EOS]).tokens
    # onnxruntime-genai pads on the right.
    assert run_genai(folder, genai_config(manifest, config), [[5, 6, 7, 0, 0], [9, 8, 7, 6, 5]])[1] == expected


@pytest.mark.parametrize("level", ["0", "4"])
def test_genai_computes_with_the_session_entries_of_the_manifest(export, level):
    og = pytest.importorskip("onnxruntime_genai")
    folder, manifest, config = export
    manifest = manifest.model_copy(update={"session": {ACCURACY: level}})
    (folder / "genai_config.json").write_text(json.dumps(genai_config(manifest, config)))
    model = og.Model(str(folder))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens([5, 6, 7])
    logits = generator.get_output("logits")
    np.testing.assert_array_equal(logits, open_decoder(folder, manifest).run(np.array([[5, 6, 7]])))


def test_genai_reads_the_tokenizer(export):
    og = pytest.importorskip("onnxruntime_genai")
    from transformers import AutoTokenizer

    folder, manifest, config = export
    (folder / "genai_config.json").write_text(json.dumps(genai_config(manifest, config)))
    tokenizer = og.Tokenizer(og.Model(str(folder)))
    expected = AutoTokenizer.from_pretrained(folder)("hello you")["input_ids"]
    assert tokenizer.encode("hello you").tolist() == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("qwen3", "qwen3"), ("gpt_oss", "gptoss"), ("opt", "decoder"), ("gpt2", "decoder"), ("lfm2", "decoder")],
)
def test_model_type_is_one_that_genai_runs_as_a_plain_decoder(name, expected):
    assert model_type(name) == expected
