"""Masks under which the tokens of a picture see each other, by token types: 1 for those of pictures."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def together(types: Tensor, mask: Tensor) -> Tensor:
    """Which keys are of the picture that a new token is of; bool [batch, 1, sequence, past + sequence]."""
    of_picture = types == 1
    begins = of_picture & ~pad(of_picture[:, :-1], (1, 0))
    number = torch.where(of_picture, begins.long().cumsum(1), 0)
    same = (number[:, :, None] == number[:, None, :]) & of_picture[:, :, None]
    return pad(same, (mask.shape[1] - types.shape[1], 0))[:, None]


def near(types: Tensor, past: Any, window: int) -> Tensor:
    """Which keys are fewer than `window` places in front of a new token, or behind it."""
    key = torch.arange(past + types.shape[1])
    query = key[past:]
    return (key[None, :] > query[:, None] - window)[None, None]
