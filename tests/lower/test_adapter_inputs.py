"""Adapters that stay apart: inputs of the file, switched in ONNX Runtime and in onnxruntime-genai."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import qexport
from helpers.adapters import low_rank, save_adapter
from helpers.random_decoders import save_model
from helpers.tokenizer_files import write_word_tokenizer
from qexport.artifact import manifest as manifests
from qexport.artifact.adapter_files import read_adapter
from qexport.capture.folder import capture_folder
from qexport.errors import InputError
from qexport.models.source import open_model
from qexport.runtime.decoder import open_decoder
from qexport.validation import load
from qexport.validation.reference import FloatOutputs, decoder_feeds

LAYER = "model.layers.{}.{}"
RECIPE = qexport.Recipe(scheme="w4a16_g32", weights={"method": "rtn"})
PROMPT = [[3, 5, 8, 13, 21, 34]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, two adapters (on q and v, and on all linears of a layer), and an export that keeps both apart."""
    root = tmp_path_factory.mktemp("apart")
    base = save_model("llama", root / "llama")
    write_word_tokenizer(base)
    shapes = {name: tuple(t.shape) for name, t in load_file(base / "model.safetensors").items()}

    def adapter(name, modules, seed, rank):
        tensors = {}
        for number, module in enumerate(modules):
            found = low_rank(module, *shapes[f"{module}.weight"], rank=rank, seed=seed + number)
            tensors |= {key: 3 * tensor for key, tensor in found.items()}
        return save_adapter(root / name, tensors, r=rank, lora_alpha=8)

    some = [LAYER.format(i, f"self_attn.{p}_proj") for i in (0, 1) for p in "qv"]
    whole = [
        LAYER.format(1, name) for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    adapters = {"some": adapter("some", some, 0, 4), "whole": adapter("whole", whole, 50, 2)}
    out = qexport.export(base, RECIPE, out_dir=root / "out", adapters=adapters).folder
    return base, adapters, out


def logits(decoder):
    decoder.reset()
    return torch.tensor(decoder.run(np.array(PROMPT))[0], dtype=torch.float32)


def float_logits(base, adapter=None):
    captured = capture_folder(open_model(base, adapter=adapter))
    return FloatOutputs(captured, decoder_feeds(captured, torch.tensor(PROMPT)), ("logits",)).outputs(0)["logits"][0]


def test_each_adapter_moves_the_file_as_it_moves_the_float_model(made):
    base, adapters, out = made
    assert manifests.load(out).adapters == ("some", "whole")
    plain, float_plain = logits(open_decoder(out)), float_logits(base)
    for name, folder in adapters.items():
        moved, float_moved = logits(open_decoder(out, adapter=name)) - plain, float_logits(base, folder) - float_plain
        alike = torch.nn.functional.cosine_similarity(moved.flatten(), float_moved.flatten(), dim=0)
        assert alike > 0.9 and 0.8 < moved.norm() / float_moved.norm() < 1.25


def test_one_pair_of_factors_serves_a_merged_product(made):
    _, _, out = made
    factors = read_adapter(out / "some.onnx_adapter")
    # q, k and v are one product: 4 columns of A for q, 4 for v, and nothing for k.
    entries = {entry.name: entry for entry in manifests.load(out).linears}
    node = entries[LAYER.format(0, "self_attn.q_proj")].node
    assert node == entries[LAYER.format(0, "self_attn.k_proj")].node
    a, b = factors[f"{node}.lora_A"].numpy(), factors[f"{node}.lora_B"].numpy()
    assert a.shape == (64, 8) and b.shape[0] == 8
    k = slice(*entries[LAYER.format(0, "self_attn.k_proj")].columns)
    assert not b[:, k].any() and b.any()


def test_genai_switches_them_in_one_model(made):
    og = pytest.importorskip("onnxruntime_genai")
    _, _, out = made
    model = og.Model(str(out))
    adapters = og.Adapters(model)
    for name in ("some", "whole"):
        adapters.load(str(out / f"{name}.onnx_adapter"), name)

    def texts(name=None):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(PROMPT[0]) + 8, do_sample=False)
        generator = og.Generator(model, parameters)
        if name:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(PROMPT[0])
        while not generator.is_done():
            generator.generate_next_token()
        return list(generator.get_sequence(0))[len(PROMPT[0]) :]

    for name in (None, "some", "whole", None):
        ours = open_decoder(out, adapter=name, max_length=64).generate(PROMPT, max_new_tokens=8).tokens[0]
        assert texts(name) == list(ours)[: len(texts(name))]


def test_each_is_validated_beside_the_base_with_it(made, tmp_path, run):
    base, adapters, out = made
    for name, folder in adapters.items():
        code, _, err = run(
            "validate", out, "--reference", base, "--adapter", f"{name}={folder}", "--windows", 1, "--window", 32,
            "--greedy", 4, "--out", tmp_path / name,
        )  # fmt: skip
        assert code == 0, err
        report = load(tmp_path / name)
        assert report.problems == () and (tmp_path / name / "report.html").is_file()
    # Beside the base with the other adapter linears that either changes are named.
    report = qexport.validate(out, base, adapter=adapters["whole"], active="some", windows=1, window=32, greedy=0)
    assert {problem.partition(":")[0].rpartition(".")[2] for problem in report.problems} >= {"v_proj", "gate_proj"}


def test_generate_takes_one_by_its_name(made, run):
    _, _, out = made
    texts = {}
    for name in (None, "some", "whole"):
        more = ["--adapter", name] if name else []
        code, texts[name], err = run("generate", out, "--prompt", "abcdef", "--max-new-tokens", 12, *more)
        assert code == 0, err
    assert len(set(texts.values())) == 3


def test_what_cannot_stay_apart_is_refused(made, tmp_path, run):
    base, adapters, out = made
    code, _, err = run("export", base, "-r", "w8a8_dyn", "--adapter", f"x={adapters['some']}", "-o", tmp_path / "a")
    assert code == 2 and "moves factors between values and weights" in err
    dora = low_rank(LAYER.format(0, "self_attn.q_proj"), 64, 64) | {
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(64)
    }
    folder = save_adapter(tmp_path / "dora", dora, use_dora=True)
    code, _, err = run("export", base, "-r", "w4a16_g32", "--adapter", f"x={folder}", "-o", tmp_path / "b")
    assert code == 2 and "has a DoRA" in err
    with pytest.raises(InputError, match="has no adapter other. It has some, whole"):
        open_decoder(out, adapter="other")
