"""Encoder-decoders (T5, BART, Whisper and their like): two exports in one folder, calibrated and compared together."""

import os

from ..capture.source import ModelFolder, open_model


def encoder_decoder(model: str | os.PathLike, *, trust_remote_code: bool = False) -> ModelFolder | None:
    """The folder of a model that is an encoder-decoder; None for any other model.

    Raises:
        InputError: there is no such model.
    """
    folder = open_model(model, trust_remote_code=trust_remote_code)
    return folder if folder.config.is_encoder_decoder else None
