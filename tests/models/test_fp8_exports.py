"""A checkpoint of 8-bit floats in tiles of 128 x 128, as DeepSeek's are: its bits are those of the file."""

import json

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import qexport
from helpers.cuda_placement.models import PROMPT, assert_decoder_on_cuda
from helpers.random_decoders import save_model

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of tiles, the last of which are parts, and one with what they stand for."""
    folder = save_model("llama", tmp_path_factory.mktemp("fp8") / "model", intermediate_size=200)
    tensors = load_file(folder / "model.safetensors")
    plain, twin = dict(tensors), folder.with_name("twin")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        w = tensors[name].float()
        (n, k), scale = w.shape, torch.rand(-(-w.shape[0] // 128), -(-w.shape[1] // 128)) * 1e-3 + 1e-3
        spread = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        tensors[name] = (w / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        plain[name] = tensors[name].float() * spread
    twin.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config))
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    for place, whole in ((folder, tensors), (twin, plain)):
        save_file(whole, place / "model.safetensors", metadata={"format": "pt"})
    return folder, twin


def test_it_stays_as_it_is_on_the_cpu(folders, tmp_path, run):
    folder, twin = folders
    code, out, _ = run("inspect", folder)
    assert code == 0 and "FP8 in blocks of 128 x 128" in out and "w8a16_fp8_b128" in out
    result = qexport.export(folder, "as_stored", out_dir=tmp_path / "out")
    assert not result.reference.why_not
    # A scale for one column of tiles is one for each row: the same format without tiles.
    assert {entry.scheme for entry in result.manifest.linears} <= {"w8a16_fp8_b128", "w8a16_fp8"}
    report = qexport.validate(result.folder, twin, windows=1, window=16, greedy=0)
    assert report.logits.kl_mean < 1e-6


def test_cuda_reads_its_bits(folders, tmp_path, cuda_placement):
    folder, _ = folders
    result = qexport.export(folder, "as_stored", out_dir=tmp_path / "out", target="cuda")
    placed = cuda_placement(result.folder / "model.onnx", result.manifest.session, dims=PROMPT)
    assert_decoder_on_cuda(placed)
    assert {entry.kernel for entry in result.manifest.linears} == {"MatMulBlockQuantizedFp8Weight"}
    graph = onnx.load(result.folder / "model.onnx").graph
    node = next(node for node in graph.node if node.name == UP)
    tensor = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
    stored = load_file(folder / "model.safetensors")[f"{UP}.weight"].view(torch.uint8).numpy()
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).view(np.uint8), stored)
