import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers import planted_faults
from helpers.tokenizer_files import write_word_tokenizer
from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.api.validating import validate
from qexport.artifact import checksums
from qexport.artifact import manifest as manifests
from qexport.errors import InputError
from qexport.recipe.recipe import Recipe
from qexport.runtime.optimized import optimize
from qexport.validation import (
    Report,
    load,
    summary_rows,
    worst_first,
)
from qexport.validation.logits import compare_logits
from qexport.validation.reference import FloatOutputs, decoder_feeds
from qexport.validation.text import choose_text

WINDOW, WINDOWS = 48, 3
TEXT = "".join(map(chr, np.random.default_rng(0).integers(33, 127, 400)))  # one token a character


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama whose tokenizer starts every text with <s>; weights large enough for peaked distributions."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=256, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    write_word_tokenizer(folder, 128)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "w4"
    export(llama, Recipe(scheme="w4a16_g32", lm_head="w8a16_g32", accuracy_level=1), out_dir=out)
    return out


@pytest.fixture(scope="module")
def report(exported, llama):
    return validate(exported, llama, text=TEXT, windows=WINDOWS, window=WINDOW)


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def tokens() -> torch.Tensor:
    """The windows by hand: <s>, then 47 characters that no other window has."""
    ids = torch.tensor([ord(c) - 33 + 4 for c in TEXT])
    body = ids[: (len(ids) // (WINDOW - 1)) * (WINDOW - 1)].view(-1, WINDOW - 1)[:WINDOWS]
    return torch.cat([torch.ones(WINDOWS, 1, dtype=torch.int64), body], 1)


def test_logits_agree_with_a_direct_computation(report, exported, llama):
    windows = tokens()
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(exported / "model.onnx", options)
    kl, same, five, cost, float_cost = [], [], [], [], []
    for ids in windows:
        with torch.no_grad():
            want = model(ids[None]).logits[0, :-1].log_softmax(-1)
        feeds = {"input_ids": ids[None].numpy(), "attention_mask": np.ones((1, WINDOW), np.int64)}
        feeds |= {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in session.get_inputs() if i.name not in feeds}
        got = torch.tensor(session.run(["logits"], feeds)[0][0, :-1]).double().log_softmax(-1)
        kl.append((want.exp() * (want - got)).sum(-1))
        same.append(want.argmax(-1) == got.argmax(-1))
        pairs = zip(want.topk(5).indices.tolist(), got.topk(5).indices.tolist(), strict=True)
        five += [len(set(a) & set(b)) / 5 for a, b in pairs]
        rows = torch.arange(WINDOW - 1)
        cost.append(-got[rows, ids[1:]])
        float_cost.append(-want[rows, ids[1:]])
    far, row, token = report.logits.farthest, *divmod(int(torch.cat(kl).argmax()), WINDOW - 1)
    assert (far.window, far.token) == (row, token + 1) and far.kl == pytest.approx(kl[row][token].item(), rel=1e-4)
    read = "".join(chr(i + 29) for i in windows[row, max(token - 23, 1) : token + 1].tolist())
    assert far.context.removeprefix("<s>").strip() == read and far.text == chr(windows[row, token + 1] + 29)
    found, positions, kl = report.logits, torch.stack(kl).mean(0), torch.cat(kl)
    assert (found.windows, found.window, found.tokens) == (WINDOWS, WINDOW, WINDOWS * (WINDOW - 1))
    # The report's float model runs in float32: logits of order 1 move by 1e-6.
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_median == pytest.approx(kl.median().item(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-4)
    assert found.top1_agreement == torch.cat(same).double().mean().item()
    assert found.top5_agreement == pytest.approx(sum(five) / len(five), rel=1e-12)
    assert found.kl_by_position == pytest.approx(positions.tolist(), rel=1e-3)  # 47 positions, a stretch each
    assert found.float_perplexity == pytest.approx(torch.cat(float_cost).mean().exp().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(torch.cat(cost).mean().exp().item(), rel=1e-5)
    assert sum(part.tokens for part in found.by_margin) == found.tokens
    differ = sum(part.tokens * part.differ for part in found.by_margin) / found.tokens
    assert differ == pytest.approx(1 - found.top1_agreement) and found.margin_separates > 0.6
    assert found.kl_mean > 1e-3, "the comparison says nothing when quantization changes nothing"


def test_layers_agree_with_hooks_on_the_transformers_model(report, exported, llama):
    """The float side of two rows against hooks, the deployed side against a session with the value as an output."""
    names = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    seen = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out[0]))
    ids = tokens()[:1]
    with torch.no_grad():
        model(ids)
    onnx_model = onnx.load(exported / "model.onnx")
    # q shares its product with k and v, and comes first.
    outputs = ["model.layers.0.self_attn.q_proj+k_proj+v_proj.output", f"{names[1]}.output"]
    onnx_model.graph.output.extend(onnx.ValueInfoProto(name=output) for output in outputs)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(onnx_model.SerializeToString(), options)
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, WINDOW), np.int64)}
    feeds |= {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in session.get_inputs() if i.name not in feeds}
    rows = {row.name: row for row in report.layers.linears}
    for name, got in zip(names, session.run(outputs, feeds), strict=True):
        want, got = seen[name], torch.tensor(got[0, :, :64]).double()
        sqnr = 10 * torch.log10(want.square().sum() / (want - got).square().sum())
        assert rows[name].sqnr_db == pytest.approx(sqnr.item(), abs=1e-3)
        assert rows[name].max_abs_error == pytest.approx((want - got).abs().max().item(), rel=1e-4)


def test_every_linear_and_block_is_compared(report):
    assert len(report.layers.linears) == 3 * 7 + 1
    assert [row.name for row in report.layers.blocks if "layers" in row.name] == [f"model.layers.{i}" for i in range(3)]
    assert report.layers.tokens == WINDOW
    assert report.placement.kernels == {"MatMulNBits": 22}
    assert not report.problems and not report.layers.moved
    assert report.verdict[0] == report.quality.sentence
    assert report.verdict[1] == "all 22 quantized linears run as MatMulNBits"


def test_errors_of_earlier_blocks_are_left_out_of_own_sqnr(report):
    last = {row.name: row for row in report.layers.linears}["model.layers.2.self_attn.q_proj"]
    assert last.own_sqnr_db > last.sqnr_db + 3
    first = report.layers.linears[0]
    assert first.own_sqnr_db == pytest.approx(first.sqnr_db, abs=1e-2)
    # int4 in groups of 32 on weights and inputs of no special shape: about 20 dB, wherever the linear is.
    assert all(17 < row.own_sqnr_db < 25 for row in report.layers.linears if row.scheme.startswith("w4"))


@pytest.mark.by_default("*up_proj")
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"])
def test_a_planted_fault_is_named_first(copy, llama, report, name):
    """One wrong scale, in the middle of the model, although everything behind it goes wrong too."""
    entry = next(entry for entry in manifests.load(copy).linears if entry.name == name)

    def change(scale):
        scale[entry.columns[0] + 5, 0] *= 30

    planted_faults.change(copy, f"{entry.node}.weight_scale.blocks", change)
    found = validate(copy, llama, text=TEXT, windows=1, window=WINDOW)
    assert worst_first(report.layers.linears)[0].name != name
    assert worst_first(found.layers.linears)[0].name == name
    assert any(sentence.startswith(f"{name} has the lowest SQNR") for sentence in found.verdict)


def test_nan_is_a_finding(copy, llama):
    name = "model.layers.1.mlp.down_proj"

    def change(scale):
        scale[0, 0] = np.nan

    planted_faults.change(copy, f"{name}.weight_scale.blocks", change)
    found = validate(copy, llama, text=TEXT, windows=2, window=WINDOW)
    assert worst_first(found.layers.linears)[0].name == name
    assert found.logits.nonfinite_tokens == found.logits.tokens == 2 * (WINDOW - 1)
    assert found.logits.kl_mean is None and found.logits.perplexity is None and found.logits.top1_agreement == 0
    assert found.logits.float_perplexity > 1 and found.logits.top5_agreement == 0
    assert set(found.logits.kl_by_position) == {None}
    assert found.problems[0].startswith(f"NaN or Inf comes out of {name}")
    json.loads((copy / "report.json").read_text(), parse_constant=pytest.fail)


def test_an_unfused_linear_is_a_problem(llama, tmp_path):
    """A dequantized weight that somebody else reads too cannot be fused."""
    name, copy = "model.layers.1.mlp.down_proj", tmp_path / "out"
    export(llama, Recipe(scheme="w8a16_pc"), out_dir=copy)
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    product = next(n for n in model.graph.node if n.name == name)
    model.graph.node.append(onnx.helper.make_node("Identity", [product.input[1]], ["weight_too"]))
    model.graph.output.append(onnx.ValueInfoProto(name="weight_too"))
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="model.onnx: is not as the export wrote it"):
        validate(copy, llama, text=TEXT, windows=1, window=WINDOW)
    checksums.write(copy)
    found = validate(copy, llama, text=TEXT, windows=1, window=WINDOW)
    assert [(u.name, u.expected, u.found) for u in found.placement.unfused] == [(name, "MatMulNBits", "MatMul")]
    assert found.placement.kernels == {"MatMulNBits": 20, "MatMul": 1}
    assert found.problems == (f"1 linear is not fused: {name} (MatMul instead of MatMulNBits)",)
    assert not any(sentence.startswith("all ") for sentence in found.verdict)


@pytest.mark.slow
def test_smoothed_linears_are_compared_up_to_a_factor(llama, tmp_path):
    export(llama, "w8a8_static", out_dir=tmp_path / "out", calibration=tokens())
    found = validate(tmp_path / "out", llama, text=TEXT, windows=1, window=WINDOW)
    rows = {row.name: row for row in found.layers.linears}
    assert {n.rpartition(".")[2] for n, row in rows.items() if row.rescaled} == {"v_proj", "up_proj"}
    # 8 bits on both sides leave 30 dB and more; channels off by factors would leave 10 at most.
    assert min(row.own_sqnr_db for row in rows.values()) > 20


def test_without_text_the_model_writes_it(exported, llama):
    found = validate(exported, llama, windows=2, window=16)
    assert found.own_text and "written by the model" in found.text
    assert found.logits.tokens == 2 * 15
    assert any("not to be compared" in sentence for sentence in found.verdict)


def test_references_and_greedy_texts_are_in_the_report(copy, llama):
    found = validate(copy, llama, text=TEXT, windows=2, window=WINDOW, references=True, greedy=5)
    assert [form.name for form in found.references] == ["float16 in PyTorch", "float32 in ONNX Runtime"]
    half, single = (form.logits for form in found.references)
    assert (
        half.tokens == single.tokens == found.logits.tokens and half.float_perplexity == found.logits.float_perplexity
    )
    assert single.kl_mean < half.kl_mean < found.logits.kl_mean and not found.problems
    greedy = found.greedy
    assert (greedy.prompts, greedy.prompt_tokens, greedy.new_tokens, len(greedy.agreed)) == (2, WINDOW, 5, 2)
    assert {"references", "greedy"} <= set(found.seconds) and load(copy) == found


def test_references_and_greedy_texts_can_be_left_out(copy, llama, report):
    assert report.greedy.new_tokens == 32 and report.references == ()
    assert validate(copy, llama, text=TEXT, windows=1, window=8, greedy=0).greedy is None
    with pytest.raises(InputError, match="-1 new tokens cannot"):
        validate(copy, llama, text=TEXT, windows=1, window=8, greedy=-1)


def test_report_json_keeps_the_export_and_reads_back(exported, report):
    saved = json.loads((exported / "report.json").read_text())
    assert set(saved) == {"export", "validation"}
    again = load(exported)
    assert isinstance(again, Report) and again.as_dict() == saved["validation"]
    assert {p.name for p in exported.iterdir() if p.name.startswith(".")} == set(), "no temporary file is left"


def test_summary_rows_are_strings(report):
    rows = summary_rows(report)
    assert all(isinstance(cell, str) and cell for row in rows for cell in row) and {len(row) for row in rows} == {3}


def test_another_checkpoint_is_refused(exported, llama, tmp_path):
    torch.manual_seed(2)
    LlamaForCausalLM(LlamaConfig.from_pretrained(llama)).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="model.embed_tokens.weight has other values"):
        validate(exported, tmp_path / "other", text=TEXT, window=WINDOW)


def test_another_size_is_refused(exported, llama, tmp_path):
    config = LlamaConfig.from_pretrained(llama)
    config.num_hidden_layers = 2
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="num_hidden_layers is 2, not 3"):
        validate(exported, tmp_path / "other", text=TEXT, window=WINDOW)


def test_a_folder_that_is_no_export_is_refused(llama):
    with pytest.raises(InputError, match="not an export"):
        validate(llama, llama)


@pytest.mark.parametrize(
    ("text", "window", "message"),
    [
        ("   \n ", 16, "it holds no text"),
        ("one small text", 64, "its 14 tokens are fewer than one sample of 63"),
        ("missing.txt", 16, "no such file"),
        (TEXT, 257, "longer than the 256"),
        (TEXT, 1, "predict nothing"),
    ],
)
def test_text_that_does_not_do(llama, text, window, message):
    with pytest.raises(InputError, match=message):
        choose_text(capture_model(llama), text, 2, window, lambda what, done, total: None)


def test_text_from_a_file_and_fewer_windows_than_asked(llama, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    chosen = choose_text(capture_model(llama), tmp_path / "text.txt", 100, WINDOW, lambda what, done, total: None)
    assert chosen.windows.shape == (len(TEXT) // (WINDOW - 1), WINDOW) and not chosen.own
    assert torch.equal(chosen.windows[:WINDOWS], tokens())
    assert "100 asked for" in chosen.described


def test_one_float_pass_serves_many_exports(llama):
    captured = capture_model(llama)
    reference = FloatOutputs(captured, decoder_feeds(captured, tokens()), ("logits",))
    again = compare_logits(reference, tokens(), lambda ids: reference.outputs(index_of(ids))["logits"][0])
    assert again.kl_mean == 0 and again.top1_agreement == 1 and again.perplexity == again.float_perplexity


def index_of(ids: torch.Tensor) -> int:
    return next(i for i, row in enumerate(tokens()) if torch.equal(row, ids))


def test_an_optimized_export_is_validated_like_any_other(copy, llama, report):
    """`optimize` gives model.onnx.data a second hard link."""
    optimize(copy, repeats=1)
    assert (copy / "model.onnx.data").stat().st_nlink == 2
    again = validate(copy, llama, text=TEXT, windows=WINDOWS, window=WINDOW)
    assert again.logits == report.logits and again.layers.linears[0].sqnr_db == report.layers.linears[0].sqnr_db
