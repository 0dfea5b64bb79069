"""Places of tokens in time, height and width are those of transformers."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from helpers.random_decoders import LISTS
from qexport.artifact.picture_positions import picture_positions
from qexport.models.vision_language.grids import places_of

TOKEN = 9


def test_a_picture_between_text_by_hand():
    ids = np.array([[1, TOKEN, TOKEN, TOKEN, TOKEN, TOKEN, TOKEN, 2, 3]])
    time, height, width = picture_positions(ids, TOKEN, [(1, 4, 6)], 2)[:, 0]
    assert time.tolist() == [0, 1, 1, 1, 1, 1, 1, 4, 5]
    assert height.tolist() == [0, 1, 1, 1, 2, 2, 2, 4, 5]
    assert width.tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("grids", [[(1, 4, 6), (1, 2, 2)], [(2, 4, 2), (1, 6, 4)]])
def test_as_transformers_says(grids):
    given = dict(LISTS["vision_language"]["qwen2_vl"])
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    token = config.image_token_id
    counts = [t * h * w // 4 for t, h, w in grids]
    ids = torch.tensor([[5, *[token] * counts[0], 6, 7, *[token] * counts[1], 8]])
    want, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=(ids == token).int(), image_grid_thw=torch.tensor(grids)
    )  # fmt: skip
    assert picture_positions(ids.numpy(), token, grids, 2).tolist() == want.tolist()


def test_places_of_patches_are_those_of_transformers():
    from transformers.vision_utils import get_vision_position_ids

    grid = torch.tensor([[1, 4, 6], [2, 2, 4], [1, 6, 2]])
    count = int(grid.prod(1).sum())
    at = places_of(grid, count, 2)
    assert torch.stack([at.row, at.column], 1).tolist() == get_vision_position_ids(grid, 2).tolist()
    frames = torch.repeat_interleave(torch.arange(4), torch.tensor([24, 8, 8, 12]))
    assert torch.unique(at.frame, return_inverse=True)[1].tolist() == frames.tolist()
