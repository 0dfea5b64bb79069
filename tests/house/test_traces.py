"""A model that is traced once for many tests is the model that each would trace."""

import copy

import pytest
import torch

import qexport
from helpers import exports, traces
from helpers.random_decoders import save_model
from helpers.random_modules import save_encoder, save_seq2seq

VERBS = {
    "llama": (save_model, qexport.export),
    "deberta": (save_encoder, qexport.export),  # its program is decomposed too
    "gpt_oss": (save_model, qexport.export),
    "t5": (save_seq2seq, qexport.export),
}
FAMILIES = ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deberta", "gpt_oss", "t5"))]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("model.onnx*")}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_from_a_remembered_trace_has_the_same_bytes(family, tmp_path, monkeypatch):
    save, export = VERBS[family]
    model = save(family, tmp_path / "model")
    remembered = {}, {}
    monkeypatch.setattr(traces, "_programs", remembered[0])
    monkeypatch.setattr(traces, "_models", remembered[1])
    export(model, "w4a16_g32_rtn", out_dir=tmp_path / "traced")
    traced = tuple(map(len, remembered))
    export(model, "w4a16_g32_rtn", out_dir=tmp_path / "again")
    assert tuple(map(len, remembered)) == traced == (2 if family == "t5" else 1, int(save is save_model))
    assert files(tmp_path / "traced") == files(tmp_path / "again") != {}


def said(**changes):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    for name, value in changes.items():
        setattr(model[1], name, value)
    return traces._said(model)


def test_models_are_the_same_just_where_nothing_tells_them_apart():
    assert said() == said()
    different = [{"eps": 1e-6}, {"elementwise_affine": 1}, {"bias": None}, {"other": []}, {"training": False}]
    different.append({"weight": torch.nn.Parameter(torch.full((4,), 1.0 + 2**-23))})
    assert all(said(**changes) != said() for changes in different)


def test_a_program_that_was_written_into_is_not_given_again(monkeypatch):
    monkeypatch.setattr(traces, "_programs", {})
    model, example = torch.nn.Linear(4, 4), (torch.ones(2, 4),)
    twin = copy.deepcopy(model)
    program = torch.export.export(model, example)
    assert torch.export.export(twin, example) is program
    with torch.no_grad():
        program.state_dict["weight"] += 1
    with pytest.raises(AssertionError, match="wrote into"):
        torch.export.export(twin, example)


def test_blocks_of_a_remembered_model_are_everybodys_own(model_folder):
    one, other = (exports.capture(model_folder("llama")) for _ in range(2))
    for mine, yours in zip(one.blocks, other.blocks, strict=True):
        assert mine.module.graph is not yours.module.graph and str(mine.module.graph) == str(yours.module.graph)
    for node in one.blocks[1].module.graph.nodes:
        node.meta.clear()
    third = exports.capture(model_folder("llama"))
    assert all(node.meta for node in third.blocks[1].module.graph.nodes if node.op == "call_function")
