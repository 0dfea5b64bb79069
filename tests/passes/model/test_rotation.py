import pytest
import torch
from safetensors.torch import save_file

from helpers.breadth import quick
from helpers.random_decoders import save_model
from qexport.api.stages.capturing import capture_model
from qexport.calibrate.float_model import running
from qexport.errors import PassError
from qexport.passes.model.rotation import RotateResidual
from qexport.passes.model.rotations_within import RotateInputs, RotateKeys, RotateValues
from qexport.quant.hadamard import _known, factored_rotation, hadamard_matrix, rotation
from qexport.quant.stiefel import descend

V_AND_DOWN = ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight")


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


@pytest.mark.by_default("bloom-*", "gemma2-*")
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


@pytest.mark.by_default("96", "1536", "13")
@pytest.mark.parametrize("size", [96, 1536, 11008, 13])
def test_two_small_factors_turn_all_channels(size):
    first, second = factored_rotation(size, 2)
    assert len(first) * len(second) == size and len(first) <= len(second)
    whole = torch.kron(first, second) if size < 2000 else None
    if whole is not None:
        assert torch.allclose(whole @ whole.t(), torch.eye(size, dtype=torch.float64), atol=1e-9)
    x = torch.randn(size, dtype=torch.float64)
    turned = first.t() @ x.view(len(first), len(second)) @ second
    assert turned.norm().item() == pytest.approx(x.norm().item())
    if whole is not None:
        assert torch.allclose(turned.flatten(), x @ whole)


def test_whether_there_is_a_hadamard_matrix_is_told_without_making_it():
    assert [_known(n) for n in range(1, 200)] == [hadamard_matrix(n) is not None for n in range(1, 200)]


def test_factors_of_an_mlp_cost_little():
    assert [len(factor) for factor in factored_rotation(1536)] == [32, 48]


WITHIN = {"values": RotateValues(), "keys": RotateKeys(), "inputs": RotateInputs()}


@pytest.mark.by_default("llama-*", "qwen3-*")
@pytest.mark.parametrize(
    ("family", "steps"),
    [
        ("llama", ("values", "keys", "inputs")),
        ("qwen3", ("residual", "values", "inputs", "keys")),
        pytest.param("gpt2", ("residual", "inputs", "keys"), marks=pytest.mark.slow),
        pytest.param("mixtral", ("values", "inputs"), marks=pytest.mark.slow),
        ("phi", ("residual", "values", "keys", "inputs")),
    ],
)
def test_rotations_within_blocks_change_no_result(family, steps, tmp_path):
    folder = save_model(family, tmp_path / family)
    want, captured = logits(capture_model(folder)), capture_model(folder)
    for step in steps:
        changed = {**WITHIN, "residual": RotateResidual()}[step].call(captured).changed
        assert len(changed) >= len(captured.blocks) - 2
    assert (logits(captured) - want).abs().max() <= 1e-4 * want.abs().max()


def test_an_outlier_of_a_head_and_of_a_gate_is_spread(tmp_path):
    captured = capture_model(save_model("llama", tmp_path / "llama"))
    plain = {name: captured.load(name) for name in V_AND_DOWN}
    RotateValues().call(captured)
    RotateInputs().call(captured)
    for name, before in plain.items():
        after = captured.load(name)
        assert after.norm().item() == pytest.approx(before.norm().item(), rel=1e-5)
        assert not torch.allclose(after, before, atol=1e-3)


def test_values_of_one_product_with_keys_are_a_reason_to_refuse(tmp_path):
    captured = capture_model(save_model("gpt2", tmp_path / "gpt2"))
    with pytest.raises(PassError, match="values straight from a linear of their own"):
        RotateValues().call(captured)


def test_a_matrix_that_was_learned_takes_the_place_of_hadamards(tmp_path):
    folder, path = save_model("llama", tmp_path / "llama"), tmp_path / "turn.safetensors"
    want, captured = logits(capture_model(folder)), capture_model(folder)
    width = 64

    def loss(turn, step):  # as little of the largest channel as can be: a row of equal magnitudes
        return turn[0].abs().pow(16).sum()

    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.linalg.qr(drawn).Q
    learned = descend(start, loss, 60, 0.02)
    assert torch.allclose(learned @ learned.t(), torch.eye(width, dtype=torch.float64), atol=1e-9)
    assert learned[0].abs().max() < 0.65 * start[0].abs().max()
    save_file({"rotation": learned}, path)
    RotateResidual(matrix=str(path)).call(captured)
    assert (logits(captured) - want).abs().max() <= 1e-4 * want.abs().max()
    assert torch.equal(next(iter(captured.basis.values())).turn, learned)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"other": torch.eye(64)}, "has no matrix named rotation"),
        ({"rotation": torch.eye(32)}, "the residual stream 64 channels"),
        ({"rotation": 2 * torch.eye(64)}, "is not orthogonal"),
    ],
)
def test_a_file_without_a_rotation_is_refused(tensors, why, tmp_path):
    captured = capture_model(save_model("llama", tmp_path / "llama"))
    save_file(tensors, tmp_path / "turn.safetensors")
    with pytest.raises(PassError, match=why):
        RotateResidual(matrix=str(tmp_path / "turn.safetensors")).call(captured)
    with pytest.raises(PassError, match="has no matrix named rotation"):
        RotateResidual(matrix=str(tmp_path / "nowhere")).call(captured)
