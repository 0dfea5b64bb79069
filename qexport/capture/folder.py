"""Capturing whatever kind of model a folder holds."""

from ..errors import CaptureError
from ..models.heads import loader_of
from ..models.source import ModelFolder
from .decoder import capture_decoder
from .encoder import capture_encoder
from .graph import CapturedModel


def capture_folder(folder: ModelFolder) -> CapturedModel:
    """Capture a decoder that writes text, or an encoder or decoder with the head that its config names.

    Raises:
        CaptureError: it is neither, or cannot be followed.
    """
    if folder.config.is_encoder_decoder:
        raise CaptureError(
            f"{folder.config.model_type} is an encoder-decoder, which becomes two exports in one folder",
            place=folder.name, remedy="Export, inspect, validate and generate take it whole. Its encoder alone exports "
            "as a module: qexport.export(AutoModel.from_pretrained(...).get_encoder(), example_inputs=...)",
        )  # fmt: skip
    loader = loader_of(folder.config, folder.name)
    return capture_decoder(folder) if loader is None else capture_encoder(folder, loader)
