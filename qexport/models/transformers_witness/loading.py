"""Transformers' model as transformers loads it: whole, a module at a time, some layers of it, or with other weights."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from ..layerwise import StoredWeights, open_layerwise
from ..witness import Absent, first_line

if TYPE_CHECKING:
    from ..source import ModelFolder


def gguf_file(folder: "ModelFolder") -> Path | None:
    """The GGUF file that the folder was made from, if it was."""
    named = Path(folder.name)
    if named.is_file():
        return named
    own = sorted(named.glob("*.gguf")) if named.is_dir() and named.resolve() != folder.path.resolve() else []
    return own[0] if len(own) == 1 else None


def opened_by_modules(
    loader: type[Any], folder: "ModelFolder", absent: frozenset[str] = frozenset()
) -> tuple[PreTrainedModel, StoredWeights]:
    """See `open_layerwise`; raises Absent where transformers cannot build the model."""
    try:
        return open_layerwise(loader, folder, absent)
    except Exception as error:  # as in `loaded`
        raise Absent(f"transformers cannot load it ({first_line(error)})") from error


def loaded(
    loader: type[Any], folder: "ModelFolder", absent: frozenset[str] = frozenset(), *, source: Path | None = None,
    container: str = "", kept: Sequence[int] = (),
) -> PreTrainedModel:  # fmt: skip
    """Transformers' model in float32.

    Args:
        absent: weights that may be missing; source: a GGUF file to read instead of the folder.
        container, kept: path of a list of layers, and those of them that are loaded; empty: all.

    Raises:
        Absent: transformers cannot load it, or makes up weights.
    """
    place, options = folder.path, dict[str, Any](use_safetensors=True)
    if source is not None:
        place, options = source.parent, {"gguf_file": source.name}
    try:
        if kept:
            with torch.device("meta"):
                config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=folder.trust_remote_code)
                whole = loader.from_config(config, trust_remote_code=folder.trust_remote_code)
            loader = _without_others(type(whole), container, kept)
        model, info = loader.from_pretrained(
            place, dtype=torch.float32, attn_implementation="eager", trust_remote_code=folder.trust_remote_code,
            output_loading_info=True, **options,
        )  # fmt: skip
    except Exception as error:  # transformers raises what its libraries raise, and remote code anything
        why = first_line(error).replace(str(place), "its folder")
        raise Absent(f"transformers cannot load it ({why})") from error
    missing = sorted(set(info["missing_keys"]) - absent)
    if missing:
        raise Absent(f"transformers finds {len(missing)} of its weights nowhere, first {missing[0]}")
    return model.eval()


def with_tensors(loader: type[Any], folder: "ModelFolder", tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """Transformers' model in float32 with these parameters and stored buffers.

    Raises:
        Absent: transformers cannot build it, or some are missing or of other shapes.
    """
    config = copy.deepcopy(folder.config)
    for part in (config, config.get_text_config()):
        if getattr(part, "_experts_implementation", None):  # which the capture sets in the config that it is given
            part._experts_implementation = "eager"
    try:
        with init_empty_weights(include_buffers=False):
            model = loader.from_config(
                config, dtype=torch.float32, attn_implementation="eager",
                trust_remote_code=folder.trust_remote_code,
            )  # fmt: skip
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
    except Exception as error:  # as in `loaded`
        raise Absent(f"transformers cannot load it ({first_line(error)})") from error
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise Absent(f"{len(missing)} of its weights are nowhere, first {missing[0]}")
    return model.eval()


def _without_others(model: type[Any], container: str, kept: Sequence[int]) -> type[Any]:
    """A model class whose other layers are empty, so that nothing is loaded for them."""

    def __init__(self, config, *args, **options):
        model.__init__(self, config, *args, **options)
        layers = self.get_submodule(container)
        for index in range(len(layers)):
            if index not in kept:
                layers[index] = torch.nn.Module()

    return type(model.__name__, (model,), {"__init__": __init__, "__module__": model.__module__})


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines and bars of transformers: what is missing or too much is the caller's to say."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
