"""From what a user names (Hub id, folder, GGUF) to a local folder with a config and safetensors."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from ..artifact.scratch import scratch
from ..errors import InputError, QExportError, reading
from ..models.configs import read_config
from ..models.gguf_header import check_gguf
from ..models.preflight import notes_on
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
        path, name = _convert_gguf(path, cache), name
    elif path.is_dir():
        gguf = sorted(path.glob("*.gguf"))
        if gguf and not any(path.glob("*.safetensors")):
            if len(gguf) > 1:
                raise InputError(f"holds {len(gguf)} GGUF files", place=name, remedy="Pass the path of one of them")
            path = _convert_gguf(gguf[0], cache)
    elif path.exists():
        raise InputError("is neither a folder nor a GGUF file", place=name)
    else:
        path = _download(name)
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


def _convert_gguf(file: Path, cache: Path | None) -> Path:
    state = file.stat()
    key = hashlib.sha256(f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()[:16]
    root = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qexport"
    target = root / f"{file.stem}-{key}"
    if target.exists():
        return target
    check_gguf(file)
    with reading(file, "cannot be read as GGUF"):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # the weights are float now, and save_pretrained would refuse them
    _save(model, tokenizer, target)
    return target


def _save(model, tokenizer, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch(target.parent) as temporary:
        made = temporary / target.name
        model.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        made.rename(target)


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
