"""Places of tokens in time, height and width, of models that give the tokens of a picture those of its patches.

Text goes on in all three at once; a picture begins at one place, its tokens are as far from there as its rows and
columns, and what follows begins behind the longer side (M-RoPE, Qwen2-VL, arXiv 2409.12191).
"""

from collections.abc import Sequence

import numpy as np


def picture_positions(ids: np.ndarray, token: int, grids: Sequence[Sequence[int]], merged: int) -> np.ndarray:
    """Places of the tokens of prompts without padding, int64 [3, batch, sequence].

    Args:
        ids: int64 [batch, sequence].
        token: the id that stands for a row of features.
        grids: patches of each picture in time, height and width, those of the first row first.
        merged: patches that one row of features holds, along each side.
    """
    found, waiting = np.zeros((3, *ids.shape), np.int64), iter(grids)
    for row, tokens in enumerate(ids):
        start, place = 0, 0
        while start < len(tokens):
            if tokens[start] != token:
                found[:, row, start] = place
                start, place = start + 1, place + 1
                continue
            time, height, width = (int(size) for size in next(waiting))
            sides = np.indices((time, height // merged, width // merged)).reshape(3, -1)
            found[:, row, start : start + sides.shape[1]] = sides + place
            start, place = start + sides.shape[1], place + max(height, width) // merged
    return found
