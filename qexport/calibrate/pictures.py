"""Drawn pictures, for models of pictures that come without any: shapes in front of a landscape of smooth colours.

Natural pictures have most of their energy in low frequencies (an amplitude of 1 / f), edges, and areas of one colour.
These have all three, so that an encoder's activations on them are closer to those on photographs than on noise.
"""

import numpy as np

_SIDE = 256  # pixels; what a model reads is made of it by its own processor
_SHAPES = 6


def drawn_picture(seed: int, height: int = _SIDE, width: int = _SIDE) -> np.ndarray:
    """A picture, the same for the same seed: uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    picture = _landscape(random, height, width)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    for _ in range(_SHAPES):
        colour, texture = random.uniform(0, 1, 3), random.uniform(0, 0.3)
        y, x, size = random.uniform(0, height), random.uniform(0, width), random.uniform(0.05, 0.3) * min(height, width)
        if random.random() < 0.5:
            inside = (rows - y) ** 2 + (columns - x) ** 2 < size**2
        else:
            turn = random.uniform(0, np.pi)
            along = (rows - y) * np.cos(turn) + (columns - x) * np.sin(turn)
            across = (columns - x) * np.cos(turn) - (rows - y) * np.sin(turn)
            inside = (np.abs(along) < size) & (np.abs(across) < size * random.uniform(0.2, 1))
        stripes = texture * np.sin(random.uniform(0.1, 1.0) * (rows + columns))[..., None]
        picture = np.where(inside[..., None], colour + stripes, picture)
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _landscape(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Colours whose amplitudes fall with the frequency, float [height, width, 3] around .5."""
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    frequencies[0, 0] = 1.0  # the mean, which is set below
    noise = random.standard_normal((3, height, width))
    smooth = np.fft.ifft2(np.fft.fft2(noise) / frequencies).real
    smooth = smooth / smooth.std(axis=(1, 2), keepdims=True)
    return 0.5 + 0.2 * (smooth - smooth.mean(axis=(1, 2), keepdims=True)).transpose(1, 2, 0)
