"""gpt-oss: experts in 4-bit floats, all of a layer in one tensor, are kept expert by expert."""

import json

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qexport
from helpers.cuda_placement.models import CUDA, PROMPT
from helpers.random_decoders import save_model
from qexport.api.stages.capturing import capture_model
from qexport.models.coded import Given
from qexport.recipe.recipe import Recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with experts of codes at random, and one with what transformers makes of these."""
    widths = dict(intermediate_size=64)  # which CUDA's kernel takes
    folder = save_model("gpt_oss", tmp_path_factory.mktemp("gpt") / "model", **widths)
    tensors, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    plain = dict(tensors)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, k, n = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (count, n, k // 32, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(118, 124, (count, n, k // 32), generator=random, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    twin = folder.with_name("twin")
    twin.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    for place, whole in ((folder, tensors), (twin, plain)):
        save_file(whole, place / "model.safetensors", metadata={"format": "pt"})
    return folder, twin


@pytest.mark.slow
def test_every_expert_is_what_transformers_makes_of_it(folders):
    folder, twin = folders
    captured, want = capture_model(folder), load_file(twin / "model.safetensors")
    experts = {name: codes for name, codes in captured.given.items() if ".experts." in name}
    config = captured.folder.config
    assert len(experts) == 2 * config.num_local_experts * config.num_hidden_layers
    for name, codes in experts.items():
        found = codes.decode()
        assert isinstance(found, Given) and codes.weight.scheme.name == "mxfp4"
        owner, number, leaf = name.removesuffix(".weight").rsplit(".", 2)
        weight = want[f"{owner}.{leaf}"][int(number)].t()
        assert torch.equal(found.dequantize(), weight) and torch.equal(codes.formula(), weight.double())


def test_logits_are_those_of_the_float_model(folders, tmp_path, run):
    folder, twin = folders
    code, out, _ = run("inspect", folder)
    assert code == 0 and "MXFP4, experts of 4-bit floats in groups of 32" in out
    recipe = Recipe.load("as_stored").model_copy(update={"accuracy_level": 1})
    result = qexport.export(folder, recipe, out_dir=tmp_path / "out")
    assert not result.reference.why_not
    assert {entry.scheme for entry in result.manifest.linears} == {"mxfp4"}
    report = qexport.validate(result.folder, twin, windows=1, window=16, greedy=0)
    assert report.logits.kl_mean < 1e-6


def test_cuda_computes_the_experts_from_their_own_bits(folders, tmp_path, cuda_placement):
    folder, _ = folders
    result = qexport.export(folder, "as_stored", out_dir=tmp_path / "out", target="cuda")
    placed = cuda_placement(result.folder / "model.onnx", result.manifest.session, dims=PROMPT)
    experts = [entry for entry in result.manifest.linears if "experts" in entry.name]
    assert {(entry.scheme, entry.kernel) for entry in experts} == {("mxfp4", "QMoE")}
    assert placed["nodes"][CUDA]["QMoE"] == 2
    graph = onnx.load(result.folder / "model.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    node = next(node for node in graph.node if node.op_type == "QMoE")
    stored = load_file(folder / "model.safetensors")
    blocks = stored["model.layers.0.mlp.experts.down_proj_blocks"].flatten(2).numpy()
    assert np.array_equal(onnx.numpy_helper.to_array(tensors[node.input[5]]), blocks)
