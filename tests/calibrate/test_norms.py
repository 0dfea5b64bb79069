"""Calibration inputs that are matched to batch norms: how far they are off, that they come nearer, and who has none."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qexport import export
from qexport.calibrate.sources.kinds.norms import batch_norms, distance, matched
from qexport.errors import InputError
from qexport.recipe.recipe import CalibrationSpec, Recipe

STATIC = Recipe(scheme="w8a8_static", calibration=CalibrationSpec(samples=12, batch_size=4))


class Listener(nn.Module):
    """Two convolutions over time with batch norms that know loud sound of their own spread."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)])
        self.last = nn.Linear(8, 4)

    def forward(self, sound):
        hidden = torch.relu(self.norms[0](self.first(sound)))
        return self.last(torch.relu(self.norms[1](self.second(hidden))).mean(-1))


@pytest.fixture(scope="module")
def listener():
    """One that has heard sound of which a channel is 30 times as loud as the others."""
    model, loud = Listener(), torch.tensor([1.0, 30.0, 3.0])[:, None]
    for norm in model.norms:
        norm.momentum = None
    with torch.no_grad():
        for seed in range(6):
            model(loud * torch.randn(16, 3, 20, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(2, 4), channels=st.integers(1, 3), length=st.integers(2, 5), seed=st.integers(0, 99))
def test_the_distance_is_that_of_its_definition(rows, channels, length, seed):
    random = np.random.default_rng(seed)
    value, norm = random.normal(1, 2, (rows, channels, length)), nn.BatchNorm1d(channels)
    norm.running_mean.copy_(torch.tensor(random.normal(size=channels)))
    norm.running_var.copy_(torch.tensor(random.uniform(0.1, 3, channels)))
    expected = 0.0
    for channel in range(channels):
        mean, variance = float(norm.running_mean[channel]), float(norm.running_var[channel])
        own = value[:, channel].flatten()
        expected += (own.mean() - mean) ** 2 / variance + (np.sqrt(own.var() + 1e-5) / np.sqrt(variance) - 1) ** 2
    assert float(distance(torch.tensor(value, dtype=torch.float32), norm)) == pytest.approx(expected / channels, 1e-3)


def test_matched_inputs_are_as_loud_as_what_the_norms_heard(listener):
    drawn = {"sound": torch.randn(8, 3, 20, generator=torch.Generator().manual_seed(9))}
    found, before, after = matched(listener, drawn, batch_norms(listener), steps=80)
    assert after < before / 20 and not listener.training
    assert 9 < found["sound"].std() < 35  # of what was heard: 17; which channel was loud, the norms do not know
    assert torch.equal(drawn["sound"], torch.randn(8, 3, 20, generator=torch.Generator().manual_seed(9)))
    assert all(not norm._forward_pre_hooks for norm in listener.norms)
    again = matched(listener, drawn, batch_norms(listener), steps=80)[0]["sound"]
    assert torch.equal(found["sound"], again)


def test_an_export_calibrates_on_them_and_says_so(listener, tmp_path):
    result = export(listener, STATIC, out_dir=tmp_path / "out", example_inputs=(torch.randn(2, 3, 20),),
                    calibration="norms")  # fmt: skip
    assert "12 rows that match the statistics of 2 norms" in result.calibration and "seed 0" in result.calibration


def test_who_keeps_no_statistics_is_refused(model_folder, tmp_path):
    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(InputError, match="no norm of the model keeps statistics"):
        export(plain, STATIC, out_dir=tmp_path / "out", example_inputs=(torch.randn(2, 4),), calibration="norms")
    with pytest.raises(InputError, match="norms of models that read text keep no statistics"):
        export(model_folder("llama"), STATIC, out_dir=tmp_path / "out", calibration="norms")
    assert not (tmp_path / "out").exists()
