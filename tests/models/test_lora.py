"""Adapters merged into weights: formulas in float64, exports, and the words for what cannot be merged."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qexport
from helpers.adapters import low_rank, save_adapter
from helpers.random_decoders import save_model
from qexport.capture.folder import capture_folder
from qexport.errors import InputError
from qexport.models.source import open_model
from qexport.validation.reader import check_reader
from qexport.validation.reference import FloatOutputs, decoder_feeds

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("lora") / "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def weights(llama):
    return {name: tensor.double() for name, tensor in load_file(llama / "model.safetensors").items()}


def product(tensors, module):
    return tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()


def merged(base, adapter):
    """The captured model with its adapter, which a witness of the formula agrees with."""
    captured = capture_folder(open_model(base, adapter=adapter))
    assert "formula of LoRA" in check_reader(captured).sentence()
    return captured


def same(got, want):
    return torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6)


def of(weights, *modules, rank=4):
    found = {}
    for seed, module in enumerate(modules):
        found |= low_rank(module, *weights[f"{module}.weight"].shape, rank=rank, seed=seed)
    return found


def test_scales_are_alpha_over_r_and_patterns_take_their_place(llama, weights, tmp_path):
    tensors = of(weights, Q) | of(weights, DOWN, rank=2)
    patterns = {"rank_pattern": {"layers.1.mlp.down_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    captured = merged(llama, save_adapter(tmp_path, tensors, **patterns))
    assert same(captured.load(f"{Q}.weight"), weights[f"{Q}.weight"] + 2 * product(tensors, Q))
    assert same(captured.load(f"{DOWN}.weight"), weights[f"{DOWN}.weight"] + 1.5 * product(tensors, DOWN))
    other = "model.layers.1.self_attn.q_proj.weight"
    assert same(captured.load(other), weights[other])


def test_rslora_divides_by_the_root_of_the_rank(llama, weights, tmp_path):
    tensors = of(weights, Q)
    captured = merged(llama, save_adapter(tmp_path, tensors, use_rslora=True))
    assert same(captured.load(f"{Q}.weight"), weights[f"{Q}.weight"] + 8 / math.sqrt(4) * product(tensors, Q))


@pytest.mark.parametrize("leaf", ("", ".weight"))
def test_dora_gives_every_row_its_magnitude(leaf, llama, weights, tmp_path):
    tensors = of(weights, Q)
    n = weights[f"{Q}.weight"].shape[0]
    size = torch.linspace(0.5, 2.0, n)
    tensors[f"{Q}.lora_magnitude_vector{leaf}"] = size
    captured = merged(llama, save_adapter(tmp_path, tensors, use_dora=True))
    changed = weights[f"{Q}.weight"] + 2 * product(tensors, Q)
    assert same(captured.load(f"{Q}.weight"), size.double()[:, None] * changed / changed.norm(dim=1, keepdim=True))


def test_embedding_alone_changes_and_the_tied_head_stays(llama, weights, tmp_path):
    table = weights["model.embed_tokens.weight"]
    vocab, width = table.shape
    low, high = torch.randn(4, vocab) * 0.1, torch.randn(width, 4) * 0.1
    tensors = {"model.embed_tokens.lora_embedding_A": low, "model.embed_tokens.lora_embedding_B": high}
    captured = merged(llama, save_adapter(tmp_path, tensors))
    assert same(captured.load("model.embed_tokens.weight"), table + 2 * (high.double() @ low.double()).t())
    assert same(captured.load("lm_head.weight"), table)


def test_saved_modules_take_the_place_of_the_base(llama, weights, tmp_path):
    head, gain = (
        torch.randn_like(weights["model.embed_tokens.weight"]).float(),
        torch.randn(weights["model.norm.weight"].shape),
    )
    tensors = of(weights, Q) | {"lm_head.weight": head, "model.norm.weight": gain}
    captured = merged(llama, save_adapter(tmp_path, tensors, modules_to_save=["lm_head", "norm"]))
    assert torch.equal(captured.load("lm_head.weight"), head)
    assert torch.equal(captured.load("model.norm.weight"), gain)
    assert same(captured.load("model.embed_tokens.weight"), weights["model.embed_tokens.weight"])


@pytest.mark.slow
def test_conv1d_is_changed_as_it_lies(tmp_path):
    base = save_model("gpt2", tmp_path / "gpt2")
    stored = load_file(base / "model.safetensors")
    module = "transformer.h.0.attn.c_attn"
    name = f"{module}.weight" if f"{module}.weight" in stored else f"{module.partition('.')[2]}.weight"
    k, n = stored[name].shape
    tensors = low_rank(module, n, k) | {f"{module}.lora_B.bias": torch.linspace(-1, 1, n)}
    captured = merged(base, save_adapter(tmp_path / "adapter", tensors, fan_in_fan_out=True, lora_bias=True))
    found = [p for block in captured.blocks for p in block.parameters if p.startswith(module)]
    turned = stored[name].double().t() + 2 * product(tensors, module)
    got = captured.load(next(p for p in found if p.endswith("weight")))
    assert same(got if got.shape == turned.shape else got.t(), turned)
    bias = stored[name.replace("weight", "bias")].double() + 2 * torch.linspace(-1, 1, n).double()
    assert same(captured.load(next(p for p in found if p.endswith("bias"))), bias)


def test_command_line_merges_and_tells(llama, weights, tmp_path, run):
    adapter = save_adapter(tmp_path / "tuned", of(weights, Q, DOWN))
    code, out, err = run("inspect", llama, "--adapter", adapter)
    assert code == 0 and "The adapter tuned is merged into the weights: LoRA of rank 4 on 2 modules" in out
    made = tmp_path / "out"
    code, out, err = run("export", llama, "-r", "w4a16_g32_rtn", "--adapter", adapter, "-o", made)
    assert code == 0, err
    assert f"qexport validate {made} --reference {llama} --adapter {adapter}\n" in out
    code, out, err = run(
        "validate", made, "--reference", llama, "--adapter", adapter, "--windows", 1, "--window", 32, "--greedy", 0
    )
    assert code == 0, err
    assert qexport.validation.load(made).problems == ()
    # Beside the base alone a linear that the adapter changes is not that of the file.
    report = qexport.validate(made, llama, windows=1, window=32, greedy=0)
    assert [problem.partition(":")[0] for problem in report.problems] == [DOWN]


@pytest.mark.parametrize(
    ("change", "said"),
    (
        ({"peft_type": "IA3"}, "is not a LoRA but IA3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changes the base"),
        ({"trainable_token_indices": [1]}, "single tokens are trained"),
    ),
)
def test_other_kinds_are_refused_in_a_sentence(change, said, llama, weights, tmp_path):
    with pytest.raises(InputError, match=said):
        open_model(llama, adapter=save_adapter(tmp_path, of(weights, Q), **change))


def test_adapters_of_other_models_and_broken_ones_are_refused(llama, weights, tmp_path, run):
    other = save_adapter(tmp_path / "other", low_rank("model.layers.9.self_attn.q_proj", 64, 64))
    wide = save_adapter(tmp_path / "wide", low_rank(Q, 24, 24))
    half = save_adapter(tmp_path / "half", {f"{Q}.lora_A.weight": torch.ones(4, 64)})
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for adapter, said in (
        (other, "changes model.layers.9.self_attn.q_proj, but the base has no"),
        (wide, f"for {Q}, but the base's tensor is"),
        (half, "has no A or no B"),
        (bare, "cannot be read"),
        (tmp_path / "none", "has no adapter_config.json"),
    ):
        code, _, err = run("inspect", llama, "--adapter", adapter)
        assert code == 2 and said in err and "Traceback" not in err
    code, _, err = run("inspect", wide)
    assert code == 2 and "--adapter" in err


@pytest.mark.slow
@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize(
    "settings",
    (
        {}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 8}, "alpha_pattern": {"v_proj": 3}},
    ),
)  # fmt: skip
def test_logits_are_those_of_peft(settings, tied, tmp_path):
    peft = pytest.importorskip("peft")
    base = save_model("llama", tmp_path / "llama", tie_word_embeddings=tied)
    config = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(task_type="CAUSAL_LM", **config),
    ).eval()
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(24)[None] * 7 % 97
    with torch.no_grad():
        want = model(ids).logits
    captured = merged(base, tmp_path / "adapter")
    got = FloatOutputs(captured, decoder_feeds(captured, ids), ("logits",)).outputs(0)["logits"]
    assert float((got - want).abs().max()) < 1e-4 * float(want.std())
