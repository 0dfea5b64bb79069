"""From what a user names (Hub id, folder, GGUF) to a local folder with a config and safetensors."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ..artifact.files import read_json
from ..errors import InputError, QExportError
from .adapters import check_adapter
from .coded import CodedCheckpoint
from .configs import CONFIG, read_config
from .files import INDEX, INDEX_SUFFIX, STATED, WHOLE, named_by
from .gguf import convert
from .lora import Adapter, open_adapter
from .preflight import notes_on
from .quantized import codes_of
from .tokenizers import load_tokenizer

# Of a repository on the Hub, before its weights: configs, tokenizer, and what a card says of its licence.
_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "LICENCE*", "NOTICE*",
          "*_Dense/model.safetensors"]


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: `path` holds config.json and safetensors; `name` is what the user called it.

    notes: what an export goes without, a sentence each.
    codes: how its weights are kept as codes; None where they are float.
    adapter: what is merged into its weights; None for the weights as they are.
    """

    path: Path
    name: str
    config: PretrainedConfig
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()
    codes: CodedCheckpoint | None = None
    adapter: Adapter | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def stated_weights(self) -> str | None:
        """The file that its config states as the weights, where it does."""
        stated = getattr(self.config, STATED, None)
        return stated if isinstance(stated, str) else None

    def tokenizer(self):
        """The tokenizer, or None where the folder has none that can be used; see `load_tokenizer`."""
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)


def open_model(
    model: str | os.PathLike | ModelFolder, *, trust_remote_code: bool = False, cache: Path | None = None,
    adapter: str | os.PathLike | None = None,
) -> ModelFolder:  # fmt: skip
    """Find a model and its config.

    Args:
        model: a local folder, a GGUF file or a folder with one, or a Hugging Face id; or what this function returned.
        trust_remote_code: run model code that comes with the checkpoint.
        cache: where converted GGUF models are kept; by default below $XDG_CACHE_HOME or ~/.cache.
        adapter: a folder with a LoRA adapter, to be merged into the weights.

    Raises:
        InputError: nothing usable is there.
    """
    if isinstance(model, ModelFolder):
        if adapter is not None:
            raise InputError(
                "cannot be added to a model that is already open", place=str(adapter), remedy="Open both together"
            )
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
    if adapter is None:
        check_adapter(path, name)
    codes = codes_of(path, name)
    config = read_config(path, name, trust_remote_code=trust_remote_code)
    if codes is not None and hasattr(config, "quantization_config"):
        del config.quantization_config  # the model that is built by it reads float weights
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    notes = (*notes_on(path, config, tokenizer), *(codes.notes if codes else ()))
    if adapter is None:
        return ModelFolder(path.resolve(), name, config, trust_remote_code, notes, codes)
    found = open_adapter(os.fspath(adapter), tied=bool(getattr(config, "tie_word_embeddings", False)))
    if found.unties:
        config.tie_word_embeddings = False
    return ModelFolder(path.resolve(), name, config, trust_remote_code, notes, codes, found)


def with_adapter(model: Any, adapter: str | os.PathLike | None, trust_remote_code: bool) -> Any:
    """A model as users name it, opened with an adapter where there is one.

    Raises:
        InputError: as `open_model`, or an adapter goes with what is no model on disk.
    """
    if adapter is None:
        return model
    if not isinstance(model, (str, os.PathLike, ModelFolder)):
        raise InputError(
            "can only be merged into a model on disk", place=str(adapter), remedy="Merge it into the module"
        )
    return open_model(model, trust_remote_code=trust_remote_code, adapter=adapter)


def source_path(model) -> Path | None:
    """The folder or file on this machine that a model is read from, as far as it is known before it is opened."""
    if isinstance(model, ModelFolder):
        return model.path
    if isinstance(model, (str, os.PathLike)) and os.path.exists(model):
        return Path(model)
    return getattr(getattr(model, "folder", None), "path", None)  # a captured one


def _download(name: str) -> Path:
    """Fetch what is read of a repository: of its weights those that `weight_files` chooses, no copies and variants."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=_SMALL))
        check_adapter(folder, name)  # whose weights would be missed below
        # The folder is called by its commit, which may not be the newest any more.
        _fetch_weights(folder, name, partial(snapshot_download, name, revision=folder.name))
        return folder
    except HFValidationError as error:
        raise InputError("is neither a local path nor a Hugging Face id", place=name) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"is not a local folder and could not be downloaded ({_first_line(error)})", place=name,
            remedy="Check the spelling and the network, or download the model and pass its folder",
        ) from error  # fmt: skip


def _fetch_weights(folder: Path, name: str, fetch: Callable[..., str]) -> None:
    """Fetch the weights that go with the small files in a folder.

    Raises:
        InputError: config.json or an index is damaged, or there are none under transformers' names.
    """
    stated = read_json(folder / CONFIG).get(STATED) if (folder / CONFIG).is_file() else None
    first = stated if isinstance(stated, str) else WHOLE
    if not first.endswith(INDEX_SUFFIX):
        fetch(allow_patterns=[escape(first), INDEX])
    if first == WHOLE and not (folder / WHOLE).is_file():
        first = INDEX
    if not (folder / first).is_file():
        raise InputError(
            f"has neither {WHOLE} nor {INDEX}" if first == INDEX else f"has no {first}, which its {CONFIG} names",
            place=name, remedy="Download what it has, and pass the folder or the GGUF file",
        )  # fmt: skip
    if first.endswith(INDEX_SUFFIX):
        fetch(allow_patterns=[escape(file) for file in named_by(folder / first)])


def _first_line(error: BaseException) -> str:
    return (
        (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if not isinstance(error, QExportError)
        else str(error)
    )
