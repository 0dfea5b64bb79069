"""Capturing whatever kind of model a folder holds."""

from ..errors import CaptureError
from .decoder import capture_decoder
from .encoder import capture_encoder, is_encoder
from .graph import Captured
from .source import ModelFolder


def capture_folder(folder: ModelFolder) -> Captured:
    """Capture a decoder or an encoder.

    Raises:
        CaptureError: it is neither, or cannot be followed.
    """
    if folder.config.is_encoder_decoder:
        raise CaptureError(
            f"{folder.config.model_type} is an encoder-decoder, which becomes two exports in one folder",
            place=folder.name, remedy="In Python: qexport.export_seq2seq and qexport.validate_seq2seq. As a module its "
            "encoder exports alone: qexport.export(AutoModel.from_pretrained(...).get_encoder(), example_inputs=...)",
        )  # fmt: skip
    return capture_encoder(folder) if is_encoder(folder.config) else capture_decoder(folder)
