import pytest
import torch

from helpers.breadth import quick
from helpers.random_decoders import save_model
from qexport.api.stages.capturing import capture_model
from qexport.calibrate.float_model import running
from qexport.errors import PassError
from qexport.passes.model.rotation import RotateResidual
from qexport.quant.hadamard import hadamard_matrix, rotation


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 64, 96, 576])
def test_rows_of_a_hadamard_matrix_are_orthogonal(size):
    found = hadamard_matrix(size)
    assert found.abs().eq(1).all()
    assert torch.equal(found @ found.t(), size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [6, 10, 36, 48])
def test_a_rotation_is_orthogonal_and_follows_from_its_seed(size):
    q = rotation(size, 3)
    assert torch.allclose(q @ q.t(), torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(q, rotation(size, 3)) and not torch.equal(q, rotation(size, 4))


def logits(captured):
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad(), running(captured) as run:
        whole, past = run(ids, None, 20)
        more, _ = run(ids[:, :1], past, 1)
    return torch.cat([whole, more], 1)


FAMILIES = ("llama", "qwen3", "gpt2", "phi", "mixtral", "gemma", "opt")


@pytest.mark.parametrize("family", quick(("llama", "gpt2", "mixtral"), among=FAMILIES))
def test_the_model_computes_what_it_did(family, tmp_path):
    folder = save_model(family, tmp_path / family)
    want = logits(capture_model(folder))
    captured = capture_model(folder)
    result = RotateResidual().call(captured)
    got = logits(captured)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert len(result.changed) == len(captured.basis) == len(captured.blocks) - 1


def test_a_head_that_is_the_embedding_is_turned_the_other_way_by_a_tensor_of_its_own(tmp_path):
    folder = save_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    want, captured = logits(capture_model(folder)), capture_model(folder)
    RotateResidual().call(captured)
    assert captured.blocks[-1].parameters[-1] == "lm_head.weight"
    assert (logits(captured) - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("bloom", "word_embeddings_layernorm makes a part of the residual stream by layer_norm"),
        ("gemma2", "layernorm makes a part of the residual stream by rms_norm"),
        ("olmo2", "layernorm makes a part of the residual stream by rms_norm"),
    ],
)
def test_a_norm_whose_gain_no_linear_can_take_is_a_reason_to_refuse(family, why, tmp_path):
    captured = capture_model(save_model(family, tmp_path / family))
    weights = captured.weights
    with pytest.raises(PassError, match=why):
        RotateResidual().call(captured)
    assert captured.weights is weights
