"""Loading a whole checkpoint with transformers, for models that are not read a block at a time."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from ..errors import CaptureError
from .source import ModelFolder
from .trace import quiet, root_cause
from .weights import Checkpoint


def load_known(folder: ModelFolder, loader: type) -> tuple[torch.nn.Module, list[str]]:
    """Load a model in float32, in evaluation mode.

    Args:
        loader: an auto class of transformers.

    Returns:
        The model, and the names of weights that the checkpoint lacks, sorted: they are made up.

    Raises:
        CaptureError: transformers cannot load it.
    """
    Checkpoint(folder.path)  # before the slow part: a damaged file is reported at once
    try:
        with quiet():
            model, info = loader.from_pretrained(
                folder.path, dtype=torch.float32, trust_remote_code=folder.trust_remote_code, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # whatever a model's code makes of a config
        what = loader.__name__.removeprefix("AutoModel").removeprefix("For") or "an encoder"
        raise CaptureError(f"transformers cannot load it as {what} ({root_cause(error)})", place=folder.name) from error
    return model.eval(), sorted(info["missing_keys"])


def load_whole(folder: ModelFolder, loader: type) -> torch.nn.Module:
    """The same for a checkpoint that has to be complete.

    Raises:
        CaptureError: transformers cannot load it, or has to make up weights that the checkpoint lacks.
    """
    model, absent = load_known(folder, loader)
    if absent:
        raise CaptureError(
            f"{len(absent)} weights are not in the checkpoint, first {absent[0]}", place=folder.name,
            remedy="The config does not belong to these weights, or the download is incomplete",
        )  # fmt: skip
    return model


def load_in_memory(folder: ModelFolder, into: Path) -> Path:
    """Load a checkpoint whose tensors are named or shaped otherwise than the model's, and save it under its own names.

    The whole model is in memory while this runs; transformers does the conversion.

    Raises:
        CaptureError: as `load_whole`.
    """
    model = load_whole(folder, AutoModelForCausalLM)
    own = {id(p): (name, p) for name, p in model.named_parameters()}  # save_pretrained would bring the old names back
    kept = model.state_dict()
    own |= {id(b): (name, b) for name, b in model.named_buffers() if name in kept}
    save_file({name: p.detach().contiguous() for name, p in own.values()}, into / "model.safetensors")
    return into
