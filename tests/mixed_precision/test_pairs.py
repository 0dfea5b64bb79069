"""Schemes of an encoder-decoder: what errors in its encoder cost in the decoder's KL."""

import json
from contextlib import ExitStack

import pytest
import torch

import qexport
from helpers.breadth import quick
from helpers.noise import Noisy
from helpers.random_decoders import LISTS
from helpers.random_modules import save_seq2seq
from helpers.runners import tokens
from qexport.api.seq2seq.sources import Sources, batches_of, write_about
from qexport.calibrate.fisher import _SEED, Carried, felt
from qexport.calibrate.float_model import running
from qexport.capture.seq2seq import capture_seq2seq
from qexport.device import HOST
from qexport.errors import InputError
from qexport.models.source import open_model
from qexport.recipe.recipe import Recipe

FAMILIES = ("t5", "bart")


def run(captured, given, noise):
    """All outputs by public name, in one graph with zeros added to every linear."""
    values = {port.value: given[port.name] for port in captured.inputs}
    for block in captured.blocks:
        results = Noisy(block.module, noise).run(*(values[name] for name in block.inputs))
        values |= dict(zip(block.outputs, results, strict=True))
    return {port.name: values[port.value] for port in captured.outputs}


@pytest.mark.parametrize("family", quick(["t5"], among=FAMILIES))
def test_gradients_of_the_decoder_go_on_through_the_encoder(tmp_path, family):
    parts = capture_seq2seq(open_model(save_seq2seq(family, tmp_path / "model")))
    random = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 128, (length,), generator=random) for length in (9, 14, 14)]
    sources = batches_of(parts, rows, 2)
    written = write_about(parts, Sources(sources, "rows"), 12, seed=1).batches
    wanted, draws = {}, torch.Generator().manual_seed(_SEED)
    for source, text in zip(sources, written, strict=True):
        noise = {}
        with ExitStack() as stack:
            for part in (parts.encoder, parts.decoder):
                stack.enter_context(running(part, HOST))
            made = run(parts.decoder, text | run(parts.encoder, source, noise), noise)["logits"].flatten(0, 1)
            likely = torch.log_softmax(made, -1)
            picked = torch.multinomial(likely.detach().exp(), 1, generator=draws)
            (-likely.gather(1, picked).sum()).backward()
        for name, zeros in noise.items():
            wanted.setdefault(name, []).append(zeros.grad.flatten(0, -2).square())
    tokens = sum(batch["input_ids"].numel() for batch in written)
    carried, seen = Carried(frozenset(port.name for port in parts.encoder.outputs), tokens), []
    for part, feeds in ((parts.decoder, written), (parts.encoder, sources)):
        for found in felt(part, feeds, carried=carried):
            for linear, x, importance in found.linears:
                squares = torch.cat(wanted[linear.name])
                each = len(squares) / tokens  # rows of a part for each token that is written
                assert x.shape == (len(squares), linear.shape[1])
                torch.testing.assert_close(importance.rows, squares.sum(1) * each, rtol=1e-3, atol=1e-6)
                torch.testing.assert_close(importance.columns, squares.sum(0) / squares.sum(), rtol=1e-3, atol=1e-6)
                seen.append(linear.name)
    assert sorted(seen) == sorted(wanted)


@pytest.mark.slow
def test_one_budget_is_spent_on_both_parts(tmp_path, monkeypatch):
    """Closer than one scheme everywhere in no more bytes, and what is found is what is validated."""
    # Wider than elsewhere: the graph of a small model is a large part of its files.
    monkeypatch.setitem(LISTS["encoder_decoders"], "t5", LISTS["encoder_decoders"]["t5"] | {"d_ff": 512})
    model, rows = save_seq2seq("t5", tmp_path / "model"), tokens(8, 24)
    recipe = Recipe(scheme="w4a16_g16", lm_head="w4a16_g16", embedding="w4a16_g16", weights={"method": "rtn"})
    qexport.export(model, recipe, out_dir=tmp_path / "plain", calibration=rows)
    size = size_of(tmp_path / "plain")
    judged = {"windows": 4, "window": 24}
    chosen = recipe.model_copy(update={"embedding": "auto"})  # both parts keep a table, whatever else is chosen
    found = qexport.export_auto(model, chosen, out_dir=tmp_path / "auto", max_bytes=size, calibration=rows, **judged)
    assert size_of(tmp_path / "auto") <= size and found.export.manifest.bytes["model"] == size_of(tmp_path / "auto")
    halves = {half: {s for n, s in found.schemes.items() if n.startswith(half)} for half in ("encoder", "decoder")}
    assert all(halves.values()) and len(set.union(*halves.values())) > 1
    assert found.export.parts["encoder"].folder == tmp_path / "auto" / "encoder"
    assert all(table.scheme is not None for table in found.export.embeddings)
    reports = {name: qexport.validate(tmp_path / name, model, greedy=64, **judged) for name in ("plain", "auto")}
    # Few sources, and others than those that costs are of.
    assert 0.5 < found.predicted_kl / found.logits.kl_mean < 2.0
    assert found.logits.kl_mean < 0.7 * reports["plain"].logits.kl_mean
    assert found.logits.kl_mean == pytest.approx(reports["auto"].logits.kl_mean, rel=1e-6)
    assert json.loads((tmp_path / "auto" / "report.json").read_text())["auto"] == found.as_dict()
    with pytest.raises(InputError, match="point of a curve is one"):
        qexport.export_auto(model, recipe, out_dir=tmp_path / "curve", curve=True, calibration=rows)


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*/model.onnx*"))
