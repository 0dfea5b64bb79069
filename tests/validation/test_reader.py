"""The captured float graph is compared with a model that somebody else read, and what differs is never exported."""

import copy
import dataclasses
import json
import warnings

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.breadth import quick
from helpers.random_decoders import FAMILIES, save_model
from helpers.random_modules import cnn, save_encoder, save_seq2seq
from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.api.validating import validate
from qexport.capture.module import capture_module
from qexport.capture.seq2seq import capture_seq2seq
from qexport.errors import CaptureError
from qexport.models.agreement import ReaderAgreement, difference, explained, row_errors
from qexport.models.checkpoint import Checkpoint, StateDict
from qexport.models.source import open_model
from qexport.models.witness import Call
from qexport.models.witness import Testimony as Said
from qexport.recipe.recipe import Recipe
from qexport.validation.reader import check_reader

RECIPE = Recipe(scheme="w8a16_g32", weights={"method": "rtn"})
ROUNDING = 1e-4  # of the spread: ten times what any family here differs by
PROJECTION = "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """llama(): a llama of five layers, captured, not compared yet."""
    folder = save_model("llama", tmp_path_factory.mktemp("five"), num_hidden_layers=5)
    once = capture_model(folder)

    def fresh():
        with warnings.catch_warnings(action="ignore"):  # about copying a fake tensor
            return copy.deepcopy(once)

    return fresh


def changed(monkeypatch, change, reader=Checkpoint):
    """Let the project's reader give change(name, tensor) instead of a tensor."""
    load = reader.load
    monkeypatch.setattr(reader, "load", lambda self, name, *index: change(name, load(self, name, *index)))


def small_memory(monkeypatch):
    free = psutil.virtual_memory()._replace(available=1 << 10)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)


def dropped_scale(monkeypatch, captured):
    changed(monkeypatch, lambda name, t: 64 * t if name == PROJECTION else t)


def permuted_projection(monkeypatch, captured):
    changed(monkeypatch, lambda name, t: t.roll(1, 0) if name == PROJECTION else t)


def swapped_file(monkeypatch, captured):
    """Another file of the folder than transformers takes."""
    tensors = load_file(captured.folder.path / "model.safetensors")
    other = captured.folder.path / "model_old.safetensors"
    save_file({name: torch.randn_like(t) for name, t in tensors.items()}, other)
    held = load_file(other)
    changed(monkeypatch, lambda name, t: held[name])


def tied_head(monkeypatch, captured):
    load = Checkpoint.load
    monkeypatch.setattr(
        Checkpoint, "load",
        lambda self, name, *index: load(self, "model.embed_tokens.weight" if name == "lm_head.weight" else name),
    )  # fmt: skip


FAULTS = {
    dropped_scale: PROJECTION, permuted_projection: PROJECTION, swapped_file: "model.embed_tokens.weight",
    tied_head: "lm_head.weight",
}  # fmt: skip


@pytest.mark.by_default("permuted_projection", "dropped_scale")
@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_of_the_reader_stops_the_export(monkeypatch, llama, tmp_path, plant):
    planted = llama()
    plant(monkeypatch, planted)
    with pytest.raises(CaptureError, match=r"the weight that was read differs from that of transformers") as stopped:
        export(planted, RECIPE, out_dir=tmp_path / "out")
    assert stopped.value.place == FAULTS[plant] and str(stopped.value).count("\n") == 0
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.by_default("permuted_projection", "dropped_scale")
@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_what_is_computed_shows_the_fault_too(monkeypatch, llama, plant):
    found = llama()
    plant(monkeypatch, found)
    found.witness = NoWeights(found.witness)
    with pytest.raises(CaptureError, match=r"differs .*from that of transformers .* rounding explains 1e-03") as error:
        check_reader(found)
    first = {swapped_file: "model.layers.0", tied_head: "output logits"}.get(plant, "model.layers.1")
    assert error.value.place == first


@dataclasses.dataclass
class NoWeights:
    """A witness that does not show its weights."""

    witness: object

    def testify(self, outline):
        return dataclasses.replace(self.witness.testify(outline), weight=lambda *_: None)


@pytest.mark.parametrize("layer", [0, 4])
def test_with_little_memory_the_outer_layers_are_compared(monkeypatch, llama, layer):
    small_memory(monkeypatch)
    found = check_reader(llama())
    assert found.compared == "layers 0, 1 and 4 as a model of their own, 2 rows of 16 tokens and 2 cached steps"
    assert found.weights == 30 and found.difference < ROUNDING
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    changed(monkeypatch, lambda n, t: -t if n == name else t)
    with pytest.raises(CaptureError) as error:
        check_reader(llama())
    assert error.value.place == name
    hidden = llama()
    hidden.witness = NoWeights(hidden.witness)
    with pytest.raises(CaptureError) as error:
        check_reader(hidden)
    assert error.value.place == f"model.layers.{layer}"


@pytest.mark.parametrize("family", quick(["gemma3"], among=["gemma3", "mixtral", "deepseek_v3"]))
def test_layers_of_several_kinds_are_compared_with_little_memory(monkeypatch, tmp_path, family):
    small_memory(monkeypatch)
    layers = 4
    more = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]} if family == "gemma3" else {}
    found = check_reader(capture_model(save_model(family, tmp_path, num_hidden_layers=layers, **more)))
    assert found.compared.startswith("layers 0, 1 and 3 as a model") and found.difference < ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_good_decoders_agree(captured, family):
    found = check_reader(captured(family))
    assert found.weights > 10 and found.difference < ROUNDING
    assert found.compared == "the whole model, 2 rows of 16 tokens and 2 cached steps"


@pytest.mark.by_default("modernbert")
@pytest.mark.parametrize("family", quick(["bert", "modernbert"], among=["bert", "roberta", "modernbert"]))
def test_good_encoders_agree(monkeypatch, tmp_path, family):
    folder = save_encoder(family, tmp_path)
    found = check_reader(capture_model(folder))
    assert found.weights > 10 and found.difference < ROUNDING and "2 x 16" in found.compared
    changed(monkeypatch, lambda name, t: 2 * t if t.dim() == 2 else t, StateDict)
    with pytest.raises(CaptureError, match="the weight that was read"):
        check_reader(capture_model(folder))


@pytest.mark.parametrize("family", quick(["bart"], among=["t5", "bart"]))
def test_both_parts_of_encoder_decoders_agree(monkeypatch, tmp_path, family):
    parts = capture_seq2seq(open_model(save_seq2seq(family, tmp_path)))
    for part in (parts.encoder, parts.decoder):
        found = check_reader(copy.deepcopy(part))
        assert found.weights > 10 and found.difference < ROUNDING
    changed(monkeypatch, lambda name, t: t.roll(1, 0) if t.dim() == 2 else t, StateDict)
    for part in (parts.encoder, parts.decoder):
        with pytest.raises(CaptureError):
            check_reader(part)


def test_a_module_is_its_own_witness_on_one_row_more(monkeypatch):
    model, image = cnn(), torch.randn(2, 3, 16, 16)
    captured = capture_module(model, (image,))
    found = check_reader(captured)
    assert found.witness == "the module's own forward, SmallCNN" and found.difference < ROUNDING
    assert found.compared == "the whole model, inputs of 2 x 3 x 16 x 16 and inputs of 3 x 3 x 16 x 16"
    changed(monkeypatch, lambda name, t: 2 * t if name == "head.weight" else t, StateDict)
    with pytest.raises(CaptureError, match="it differs from that of the module's own forward"):
        check_reader(capture_module(model, (image,)))


def test_what_transformers_cannot_load_is_said(llama, tmp_path):
    found = llama()
    (found.folder.path / "config.json").rename(tmp_path / "config.json")  # as if it knew no such model
    try:
        agreement = check_reader(found)
    finally:
        (tmp_path / "config.json").rename(found.folder.path / "config.json")
    assert agreement.difference is None and agreement.why_not.startswith("transformers cannot load it (")
    assert str(found.folder.path) not in agreement.why_not


def test_export_and_validate_say_what_the_reference_is(run, model_folder, tmp_path):
    source, out = model_folder("llama"), tmp_path / "out"
    code, printed, _ = run("export", source, "-o", out, "-r", "w8a16_g32")
    assert code == 0 and "reference: the float graph agrees with transformers" in printed
    said = json.loads((out / "report.json").read_text())["export"]["reference"]
    assert said["weights"] == 21 and said["difference"] < ROUNDING < said["bound"]
    code, printed, _ = run("validate", out, "--reference", source, "--windows", 1, "--window", 16, "--greedy", 0)
    assert code == 0 and "reference checked by" in printed and "LlamaForCausalLM" in printed
    reader = json.loads((out / "report.json").read_text())["validation"]["reader"]
    assert reader == said
    for page in ("report.html", "README.md"):
        assert "LlamaForCausalLM" in (out / page).read_text()


def test_validate_does_not_share_a_mistake_of_the_export(monkeypatch, llama, tmp_path):
    out, broken = tmp_path / "out", llama()
    dropped_scale(monkeypatch, broken)
    broken.reader = ReaderAgreement(why_not="an export made before there was a comparison")
    export(broken, RECIPE, out_dir=out)
    with pytest.raises(CaptureError, match="the weight that was read differs"):
        validate(out, llama(), text="a b c", windows=1, window=16)


def test_few_tokens_may_differ_where_the_model_chooses():
    want = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    got = want.clone()
    got[3] = 0.0
    assert difference([(want, got)], chooses=True) == 0.0
    assert difference([(want, got)], chooses=False) == pytest.approx(1.0, abs=0.3)
    got[:6] = 0.0
    assert difference([(want, got)], chooses=True) > 0.5


def test_differences_are_of_the_spread_and_of_the_dtype():
    want = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)) + 1000.0
    assert row_errors(want, want + 1.0).numpy() == pytest.approx(1.0, abs=0.1)  # not of 1000
    few = torch.tensor([[5.0], [5.0]])
    assert row_errors(few, 2 * few).tolist() == [1.0, 1.0]
    masked = torch.full((1, 10), -torch.inf)
    assert row_errors(masked, masked).tolist() == [0.0] and row_errors(masked, masked + torch.nan).isinf().all()
    assert difference([(want, want[:2])], False) == float("inf")
    eps = torch.finfo(torch.float32).eps
    assert explained(eps) == 8192 * eps and explained(torch.finfo(torch.bfloat16).eps) == 0.05


def test_another_witness_may_speak_for_a_model():
    """As for a checkpoint of codes, of which the published formula is the witness."""
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))

    class Formula:
        def testify(self, outline):
            x = torch.eye(8)
            return Said("the formula", [Call({"input": x}, {"output": (weight.double() @ x.double()).T})])

    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    captured = capture_module(model, {"input": torch.randn(2, 8)})
    captured.witness = Formula()
    with pytest.raises(CaptureError, match="that of the formula"):
        check_reader(captured)
    with torch.no_grad():
        model[0].weight.copy_(weight)
    captured = capture_module(model, {"input": torch.randn(2, 8)})
    captured.witness = Formula()
    assert check_reader(captured).witness == "the formula"
