"""Blocks of GGUF are read as gguf reads them, and are in the file that is exported."""

import numpy as np
import onnx
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from onnx import numpy_helper

import qexport
from helpers.gguf_files import write_gguf
from qexport.errors import NumericsError
from qexport.models.checkpoint import GivenCodes
from qexport.models.coded import Given, Header, format_of
from qexport.models.coded.gguf_blocks import BLOCKS
from qexport.models.source import open_model
from qexport.passes.weights.as_stored import proved
from qexport.recipe.recipe import Recipe

KINDS = {"attn_q": "Q8_0", "ffn_up": "Q5_0", "ffn_down": "Q4_1"}

FLOATS = {"Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,), "TQ2_0": (64,), "MXFP4": ()}  # where scales of blocks lie
ENDS = {"TQ2_0": (-1, 1), "IQ4_NL": (-127, 113), "IQ4_XS": (-127, 113), "MXFP4": (-12, 12)}  # of codes


def kind(name):
    """Of a tensor of a file: several of linears, no blocks of others."""
    return "F32" if "norm" in name or not name.startswith("blk") else KINDS.get(name.split(".")[2], "Q4_0")


def weight_of(kind, blocks):
    """The weight of blocks in memory, and what reads them."""
    name, said = f"layer.{kind.lower()}", {"quant_method": "gguf", "blocks": [kind], "float": []}
    (weight,) = format_of(said).find({name: Header("U8", tuple(blocks.shape))}, {}.__getitem__)
    return weight, {name: blocks}.__getitem__


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_bytes_are_what_gguf_says(kind):
    """Every code and scale, of random bytes; in order float16 scales without NaN."""
    size, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (6, 2, width), dtype=np.uint8)
    if kind == "TQ2_0":
        blocks &= blocks >> 1 & 0x55 ^ 0xFF  # no code is 3
    for at in FLOATS.get(kind, (0, 2) if BLOCKS[kind].minimum else (0,)):
        blocks[..., at : at + 2] = random.normal(size=(6, 2, 1)).astype(np.float16).view(np.uint8)
    weight, read = weight_of(kind, torch.from_numpy(blocks.reshape(6, 2 * width)))
    found = weight.decode(read)
    assert isinstance(found, Given) and weight.shape == (6, 2 * size)
    assert torch.equal(found.dequantize().double(), weight.formula(read)) and found.weight.format.symmetric
    assert found.weight.format.group_size == BLOCKS[kind].group
    low, high = found.weight.codes.min(), found.weight.codes.max()
    if kind in ENDS:
        assert (int(low), int(high)) == ENDS[kind]
        return
    assert (int(low), int(high)) == (-(1 << BLOCKS[kind].bits - 1), (1 << BLOCKS[kind].bits - 1) - 1)


def test_a_scale_that_is_no_number_is_refused():
    weight, read = weight_of("Q8_0", torch.full((1, 34), 255, dtype=torch.uint8))
    with pytest.raises(NumericsError, match="32 of 32 weights are NaN or Inf"):
        proved(GivenCodes(weight, read))


def test_blocks_in_the_exported_file(model_folder, tmp_path):
    """Rows of queries and keys in the order of the model."""
    file = write_gguf(model_folder("llama"), tmp_path / "tiny.gguf", kind=kind)
    folder = open_model(file, cache=tmp_path / "cache")
    assert folder.codes.described == "GGUF, blocks of Q4_0, Q4_1, Q5_0, Q8_0"
    result = qexport.export(folder, out_dir=tmp_path / "out")
    assert result.reference.witness.endswith("of the GGUF file") and not result.reference.why_not
    assert "14 of 15 linears keep them, 12 as stored and 2 in another form" in result.codes

    tensors = {t.name: t.data for t in GGUFReader(file).tensors}
    graph = onnx.load(result.folder / "model.onnx").graph
    entry = next(e for e in result.manifest.linears if e.name == "model.layers.1.self_attn.k_proj")
    node = next(n for n in graph.node if n.name == entry.node)
    codes, scales = (
        numpy_helper.to_array(next(t for t in graph.initializer if t.name == name)) for name in node.input[1:3]
    )  # fmt: skip
    rows, (n, k) = slice(*(entry.columns or (0, entry.shape[0]))), entry.shape
    codes, scales = codes.reshape(len(codes), -1)[rows], scales.reshape(len(codes), -1)[rows]
    blocks = tensors["blk.1.attn_k.weight"].reshape(n, k // 32, 18)
    heads = folder.config.num_key_value_heads
    order = np.arange(n).reshape(heads, n // heads // 2, 2).swapaxes(1, 2).flatten()
    halves = blocks[order][..., 2:]
    want = np.concatenate((halves & 15, halves >> 4), -1).reshape(n, k)
    assert np.array_equal(np.stack((codes & 15, codes >> 4), -1).reshape(n, k), want)
    assert np.array_equal(scales, blocks[order][..., :2].copy().view(np.float16)[..., 0].astype(np.float32))


@pytest.mark.parametrize("others", [("ffn_down",), ("ffn_down", "ffn_up", "ffn_gate", "attn_output")])
def test_blocks_of_other_types_become_float(model_folder, tmp_path, others, monkeypatch):
    """A sentence names them; where they are most, the whole file becomes float."""
    monkeypatch.delitem(BLOCKS, "Q5_1")

    def types(name):
        return "Q5_1" if name.split(".")[-2] in others else kind(name)

    folder = open_model(write_gguf(model_folder("llama"), tmp_path / "t.gguf", kind=types), cache=tmp_path / "cache")
    if len(others) == 1:
        assert "Q5_1" not in folder.codes.described
        assert any("linears in Q5_1 become float" in note for note in folder.notes)
    else:
        assert folder.codes is None and not folder.notes
    assert not hasattr(folder.config, "quantization_config")


@pytest.mark.slow
def test_logits_are_those_of_the_file(model_folder, tmp_path):
    """As transformers reads it, with minimums of groups too."""
    folder = open_model(write_gguf(model_folder("llama"), tmp_path / "t.gguf", kind=kind), cache=tmp_path / "cache")
    recipe = Recipe.load("as_stored").model_copy(update={"accuracy_level": 1})
    result = qexport.export(folder, recipe, out_dir=tmp_path / "out")
    plan = {p.name: p.bytes for p in qexport.inspect(folder, recipe).linears}
    assert plan["model.layers.0.mlp.down_proj"] == 64 * 96 // 2 + 2 * 4 * 64 * 96 // 32  # a minimum beside every scale
    report = qexport.validate(result.folder, folder, windows=1, window=16, greedy=0)
    assert report.logits.kl_mean < 1e-9
