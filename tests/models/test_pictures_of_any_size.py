"""Pictures of different sizes: rows without gaps, places between those of a table, and how many rows they have."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from qexport.models.vision_language.grids import Places, between, places_of
from qexport.models.vision_language.kinds.lfm2_vl import _places
from qexport.models.vision_language.ragged import behind_zeros, in_front
from qexport.runtime.padded_pictures import ByPlaces, ByShapes, BySizes, padded_of

SIDES = st.integers(1, 9)


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4))
def test_rows_that_are_there_come_first_in_their_order(there):
    here = torch.tensor(there)
    rows = torch.randn(*here.shape, 2, generator=torch.Generator().manual_seed(0))
    parts = [picture[kept] for picture, kept in zip(rows, here, strict=True)]
    assert torch.equal(in_front(rows, here), behind_zeros(parts, here.numel()))


def table(side, corners):
    weight = torch.randn(side * side, 3, generator=torch.Generator().manual_seed(1))
    return weight, SimpleNamespace(num_grid_per_side=side, interpolation_align_corners=corners)


@pytest.mark.parametrize("corners", [True, False])
@given(height=SIDES, width=SIDES, side=st.integers(2, 6))
def test_places_lie_between_those_of_a_table_as_pytorch_interpolates(height, width, side, corners):
    weight, about = table(side, corners)
    at = places_of(torch.tensor([[1, height, width]]), height * width, 1)
    rows, shares = between(about, at)
    got = (weight[rows] * shares[..., None]).sum(1)
    image = weight.t().reshape(1, 3, side, side)
    want = interpolate(image, (height, width), mode="bilinear", align_corners=corners)[0].flatten(1).t()
    assert torch.allclose(got, want, atol=1e-5)


@given(height=SIDES, width=SIDES, side=st.integers(2, 6))
def test_a_table_is_smoothed_where_a_tile_has_fewer_patches(height, width, side):
    weight, _ = table(side, False)
    about = SimpleNamespace(position_embedding_size=side, position_embedding=SimpleNamespace(weight=weight))
    got = _places(about, torch.tensor([[height, width]]), height * width + 2)[0, : height * width]
    # As transformers has it in memory: channel by channel PyTorch 2.13 makes other rows of a tile one patch wide.
    image = weight.t().reshape(1, 3, side, side).to(memory_format=torch.channels_last)
    want = interpolate(image, (height, width), mode="bilinear", align_corners=False, antialias=True)
    assert torch.allclose(got, want[0].flatten(1).t(), atol=1e-5)


def test_places_of_patches_that_come_in_squares():
    at = places_of(torch.tensor([[1, 2, 4], [1, 4, 2]]), 16, 2)
    assert isinstance(at, Places) and at.frame.tolist() == [0] * 8 + [8] * 8
    assert at.row.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3]
    assert at.column.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("about", "kind", "dims"),
    [
        ({"sizes": "which", "pixels_of_a_row": 28}, BySizes, {"pixels": ("n", 3, "h", "w"), "which": ("n", 2)}),
        ({"places": "which", "patches_of_a_row": 3}, ByPlaces, {"pixels": ("n", "p", 12), "which": ("n", "p", 2)}),
        ({"shapes": "which", "patches_of_a_row": 2}, ByShapes, {"pixels": ("n", "p", 12), "which": ("n", 2)}),
    ],
)
def test_pictures_that_are_measured_have_16_rows_along_each_side(about, kind, dims):
    padded, random = padded_of(about), np.random.default_rng(0)
    made = {name: padded.example(name, sizes, 3, random) for name, sizes in dims.items()}
    assert isinstance(padded, kind) and padded.rows(made) == 3 * 16 * 16
    assert made["pixels"].dtype == np.float32 and made["which"].dtype == np.int64
    assert padded_of({}) is None
