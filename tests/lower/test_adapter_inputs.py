"""Adapters that stay apart: inputs of the file, switched in ONNX Runtime and in onnxruntime-genai."""

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

import qexport
from helpers import coded_checkpoints as packers
from helpers.adapters import low_rank, save_adapter
from helpers.breadth import quick
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


@pytest.mark.slow
def test_texts_are_those_of_peft(made, tmp_path):
    """Adapters that PEFT made, switched in one session of genai over a float base, and in PEFT over the same one."""
    og, peft = pytest.importorskip("onnxruntime_genai"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = made[0]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = ("one", "two")
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
        if seed == 0:
            model = peft.get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    model.save_pretrained(tmp_path / "peft")
    adapters = {name: tmp_path / "peft" / name for name in names}
    out = qexport.export(base, qexport.Recipe(scheme="float"), out_dir=tmp_path / "out", adapters=adapters).folder

    session = og.Model(str(out))
    loaded = og.Adapters(session)
    for name in names:
        loaded.load(str(out / f"{name}.onnx_adapter"), name)

    def text(name):
        parameters = og.GeneratorParams(session)
        parameters.set_search_options(max_length=len(PROMPT[0]) + 24, do_sample=False)
        generator = og.Generator(session, parameters)
        if name:
            generator.set_active_adapter(loaded, name)
        generator.append_tokens(PROMPT[0])
        while not generator.is_done():
            generator.generate_next_token()
        return list(generator.get_sequence(0))

    def want(name):
        ids, options = torch.tensor(PROMPT), {"max_new_tokens": 24, "do_sample": False}
        if name is None:
            with model.disable_adapter():
                return model.generate(input_ids=ids, **options)[0].tolist()
        model.set_adapter(name)
        return model.generate(input_ids=ids, **options)[0].tolist()

    texts = {name: text(name) for name in (None, *names)}
    assert len({str(ids) for ids in texts.values()}) == 3
    for name in (*names, None, *names):
        ids, peft_ids = text(name), want(name)
        assert ids == peft_ids[: len(ids)] and peft_ids[len(ids) :] in ([], [2])  # genai leaves the end token out


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


def alone(out, base, adapters, tmp_path):
    """For each adapter and for none: how far what it moves in the file is from what it moves in the float model."""
    plain, float_plain = logits(open_decoder(out)), float_logits(base)
    for name, folder in adapters.items():
        moved, want = logits(open_decoder(out, adapter=name)) - plain, float_logits(base, folder) - float_plain
        yield name, float((moved - want).norm() / want.norm())


@pytest.mark.slow
def test_float_linears_take_them_too(made, tmp_path):
    base, adapters, _ = made
    out = qexport.export(base, qexport.Recipe(scheme="float"), out_dir=tmp_path / "out", adapters=adapters).folder
    assert all(off < 1e-4 for _, off in alone(out, base, adapters, tmp_path))


@pytest.mark.by_default("act-order")
@pytest.mark.parametrize("form", quick(("act-order", "nf4"), among=["act-order", "nf4", "factors"]))
def test_a_base_of_codes_takes_them(made, tmp_path, form):
    """QLoRA on its own nf4 base, and linears that read their input in another order or multiplied: A reads the value
    that the linear of the float model reads."""
    _, adapters, _ = made
    folder = save_model("llama", tmp_path / "model")
    write_word_tokenizer(folder)
    twin = packers.coded(folder, *CODED[form])
    recipe = qexport.Recipe.load("as_stored").model_copy(update={"accuracy_level": 1})
    out = qexport.export(folder, recipe, out_dir=tmp_path / "out", adapters=adapters).folder
    assert (logits(open_decoder(out)) - float_logits(twin)).abs().max() < 1e-4
    assert all(off < 1e-4 for _, off in alone(out, twin, adapters, tmp_path))


@pytest.mark.slow
def test_branches_of_lorc_go_with_them(made, tmp_path):
    """The error that is left is of the codes: an adapter moves the file with branches as it moves it without."""
    base, adapters, _ = made
    recipe = qexport.Recipe(scheme="w8a16_g32", weights={"method": "rtn"}, lorc={"rank": 4}, accuracy_level=1)
    out = qexport.export(base, recipe, out_dir=tmp_path / "out", adapters=adapters).folder
    names = {node.op_type for node in onnx.load(out / "model.onnx").graph.node if "lora" in node.name}
    assert names == {"MatMul", "Add"} and manifests.load(out).adapters == ("some", "whole")
    assert all(off < 0.03 for _, off in alone(out, base, adapters, tmp_path))


def _act_order(path, shape):
    made = packers.random_codes(shape, 4, 32, seed=len(path), act_order=True)
    group_of = packers.random_codes((1, shape[1]), 4, 32, seed=shape[1], act_order=True)[3]
    made = (*made[:3], group_of)
    return packers.gptq(*made, 4), packers.dequantized(*made)


def _nf4(path, shape):
    codes = packers.random_codes(shape, 4, 32, seed=len(path))[0]
    absmax = torch.rand(shape[0] * shape[1] // 32, generator=torch.Generator().manual_seed(len(path))) / 4
    values = torch.tensor(packers.TABLES["nf4"], dtype=torch.float64)[codes]
    return packers.bitsandbytes(codes, absmax, "nf4", 32), values * absmax.double().repeat_interleave(32).view(shape)


def _factors(path, shape):
    """ModelOpt's int8 with factors of inputs."""
    random = torch.Generator().manual_seed(len(path))
    codes = torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)
    scale, factor = torch.rand(shape[0], generator=random) / 400, 0.5 + torch.rand(shape[1], generator=random)
    parts = {".weight": codes, ".weight_scale": scale, ".pre_quant_scale": factor}
    return parts, codes.double() * scale.double()[:, None] * factor.double()


CODED = {  # how a linear is packed, and what the config says
    "act-order": (
        _act_order, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True},
    ),
    "nf4": (_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "factors": (_factors, {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"}),
}  # fmt: skip
