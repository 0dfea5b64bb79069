"""Capturing whatever kind of model a folder holds."""

from ..errors import CaptureError
from ..models.heads import HIDDEN_STATES, Head, head_of, in_two_parts, reads_more_than_text, reads_text
from ..models.pooling import Pooled, read_pooling
from ..models.source import ModelFolder
from ..models.vision_language import in_three_parts
from .decoder import capture_decoder
from .encoder import capture_encoder
from .features import capture_features
from .graph import CapturedModel


def capture_folder(folder: ModelFolder) -> CapturedModel:
    """Capture a decoder that writes text, or what reads its input whole, with the head that its config names.

    Raises:
        CaptureError: it is neither, or cannot be followed.
    """
    config = folder.config
    if in_two_parts(config):
        raise CaptureError(
            f"{config.model_type} is an encoder-decoder, which becomes two exports in one folder",
            place=folder.name, remedy="Export, inspect, validate and generate take it whole. Its encoder alone exports "
            "as a module: qexport.export(AutoModel.from_pretrained(...).get_encoder(), example_inputs=...)",
        )  # fmt: skip
    if in_three_parts(config):
        raise CaptureError(
            f"{config.model_type} is a model of pictures and text, which becomes three exports in one folder",
            place=folder.name, remedy="Export, inspect, validate and generate take it whole",
        )  # fmt: skip
    if reads_more_than_text(config):
        raise CaptureError(
            f"{config.model_type} reads pictures or sound beside text, and is of no kind that is known for that",
            place=folder.name, remedy="The kinds are in docs/vision-language.md; a further one is a file of its own. "
            "Parts of it export as modules: qexport.export(model.get_submodule(...), example_inputs=...)",
        )  # fmt: skip
    if not reads_text(config):
        return capture_features(folder, head_of(config, folder.name) or HIDDEN_STATES)
    pooling = read_pooling(folder.path)
    if pooling is not None:
        return capture_encoder(folder, Head("sentence-similarity", Pooled(pooling), "embedding"))
    head = head_of(config, folder.name)
    return capture_decoder(folder) if head is None else capture_encoder(folder, head)
