"""Experts that are copied instead of traced: the same graph as when every one is traced."""

import pytest
import torch

from helpers.random_decoders import save_model
from qexport.calibrate.block_activations import decoder_inputs, stream_of
from qexport.calibrate.float_model import weights_of
from qexport.capture import expert_copies, experts
from qexport.capture.decoder import capture_decoder
from qexport.errors import CaptureError
from qexport.graph.sites import linears
from qexport.models.source import open_model

pytestmark = pytest.mark.traced_anew

COUNT = 7
MANY = {"num_experts": COUNT, "num_local_experts": COUNT, "n_routed_experts": COUNT}


def outputs(captured):
    """Logits of two texts."""
    ids = torch.arange(12).view(2, 6)
    stream = stream_of(captured, [decoder_inputs(captured, ids, torch.ones_like(ids))], keep_too={"logits": 99})
    logits = next(port.value for port in captured.outputs if port.name == "logits")
    for block in captured.blocks:
        with weights_of(captured, block):
            made = block.module(*stream.inputs(block, 0))
        stream.batches[0].update(zip(block.outputs, made, strict=True))
    return stream.batches[0][logits]


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow),
                                    pytest.param("mixtral", marks=pytest.mark.slow),
                                    pytest.param("deepseek_v3", marks=pytest.mark.slow),
                                    pytest.param("jetmoe", marks=pytest.mark.slow)])  # fmt: skip
def test_copies_are_what_tracing_gives(family, tmp_path, monkeypatch):
    one_layer = {"num_hidden_layers": 1} if family == "qwen3_moe" else {}  # those of others are not alike
    folder = save_model(family, tmp_path, **MANY, **one_layer)
    copied = capture_decoder(open_model(folder))
    with monkeypatch.context() as patched:
        patched.setattr(experts, "_TRACED", COUNT)
        traced = capture_decoder(open_model(folder))
    for one, other in zip(copied.blocks, traced.blocks, strict=True):
        assert sorted(one.parameters) == sorted(other.parameters)
        names = [sorted(linear.name for linear in linears(block.module.graph)) for block in (one, other)]
        assert names[0] == names[1]
        assert len(one.module.graph.nodes) == len(other.module.graph.nodes)
    torch.testing.assert_close(outputs(copied), outputs(traced), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_an_expert_that_is_read_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(expert_copies, "_is_share", lambda *_: False)
    with pytest.raises(CaptureError, match="reads 2 weights and 0 shares by its number") as refused:
        capture_decoder(open_model(save_model("qwen3_moe", tmp_path, **MANY)))
    assert refused.value.place == "model.layers.0.mlp.experts"
