"""From what a user names (Hub id, folder, GGUF) to a local folder with a config and safetensors."""

import os
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from ..errors import InputError, QExportError
from ..models.adapters import check_adapter
from ..models.configs import read_config
from ..models.gguf import convert
from ..models.preflight import notes_on
from ..models.quantized import check_float
from ..models.tokenizers import load_tokenizer

# Of a repository on the Hub: the model, and what the card of an export says of its licence.
_WANTED = [
    "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "LICENCE*", "NOTICE*",
]  # fmt: skip


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: `path` holds config.json and safetensors; `name` is what the user called it.

    notes: what an export goes without, a sentence each.
    """

    path: Path
    name: str
    config: PretrainedConfig
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def stated_weights(self) -> str | None:
        """The file that its config states as the weights, where it does."""
        stated = getattr(self.config, "transformers_weights", None)
        return stated if isinstance(stated, str) else None

    def tokenizer(self):
        """The tokenizer, or None where the folder has none that can be used; see `load_tokenizer`."""
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)


def open_model(
    model: str | os.PathLike | ModelFolder, *, trust_remote_code: bool = False, cache: Path | None = None
) -> ModelFolder:
    """Find a model and its config.

    Args:
        model: a local folder, a GGUF file or a folder with one, or a Hugging Face id; or what this function returned.
        trust_remote_code: run model code that comes with the checkpoint.
        cache: where converted GGUF models are kept; by default below $XDG_CACHE_HOME or ~/.cache.

    Raises:
        InputError: nothing usable is there.
    """
    if isinstance(model, ModelFolder):
        return model
    path, name = Path(model), str(model)
    if path.suffix == ".gguf" and path.is_file():
        path = convert(path, cache)
    elif path.is_dir():
        gguf = sorted(path.glob("*.gguf"))
        if gguf and not any(path.glob("*.safetensors")):
            if len(gguf) > 1:
                raise InputError(
                    f"holds {len(gguf)} GGUF files", place=name,
                    remedy="Pass the path of one of them; parts of one model have to be joined first, with "
                    "llama-gguf-split --merge",
                )  # fmt: skip
            path = convert(gguf[0], cache)
    elif path.exists():
        raise InputError("is neither a folder nor a GGUF file", place=name)
    else:
        path = _download(name)
    check_adapter(path, name)
    check_float(path, name)
    config = read_config(path, name, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    return ModelFolder(path.resolve(), name, config, trust_remote_code, notes_on(path, config, tokenizer))


def source_path(model) -> Path | None:
    """The folder or file on this machine that a model is read from, as far as it is known before it is opened."""
    if isinstance(model, ModelFolder):
        return model.path
    if isinstance(model, (str, os.PathLike)) and os.path.exists(model):
        return Path(model)
    return getattr(getattr(model, "folder", None), "path", None)  # a captured one


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except HFValidationError as error:
        raise InputError("is neither a local path nor a Hugging Face id", place=name) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"is no local folder and could not be downloaded ({_first_line(error)})", place=name,
            remedy="Check the spelling and the network, or download the model and pass its folder",
        ) from error  # fmt: skip


def _first_line(error: BaseException) -> str:
    return (
        (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if not isinstance(error, QExportError)
        else str(error)
    )
