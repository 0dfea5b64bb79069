"""The output folder: everything a runtime needs, appearing complete or not at all."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_ir as ir

from ..artifact import manifest as manifests
from ..artifact.files import read_json
from ..artifact.manifest import Manifest
from ..artifact.tokenizer import write_tokenizer
from ..errors import InputError
from ..log import warn
from ..models.preflight import GENERATION, LEGAL_FILES, generation_config
from ..models.source import ModelFolder
from ..runtime.genai import genai_config
from .emitter import VIEW_OF, name_of

_COPIED = ("config.json", "generation_config.json")  # what the runtime reads


def write_model(folder: Path, model: ir.Model, progress: Callable[[int, int], None]) -> int:
    """Save model.onnx with its tensors in model.onnx.data; returns the bytes of both.

    An initializer that is a view of another points at the other's bytes: ONNX Runtime maps them into memory once, where
    a Reshape in the graph would be folded into a copy when the session is made.
    """
    initializers = model.graph.initializers
    views = {value: initializers[value.meta[VIEW_OF]] for value in initializers.values() if VIEW_OF in value.meta}
    for value in views:
        value.const_value = None  # what has no data yet is not written
    ir.external_data.unload_from_model(
        model, folder, f"{manifests.MODEL_FILE}.data",
        size_threshold_bytes=256,  # ONNX Runtime reads shape constants while it loads and wants them in the file
        callback=lambda _tensor, info: progress(info.index + 1, info.total),
    )  # fmt: skip
    for value, source in views.items():
        value.const_value = _reshaped(source, value)
    ir.save(model, folder / manifests.MODEL_FILE)
    return sum(p.stat().st_size for p in folder.iterdir())


def _reshaped(source: ir.Value, value: ir.Value) -> ir.TensorProtocol:
    tensor, shape, name = source.const_value, value.shape, name_of(value)
    if tensor is None or shape is None:
        raise TypeError(f"{name} is a view of {source.name}, and one of them is no initializer")
    if not isinstance(tensor, ir.ExternalTensor):
        return ir.tensor(tensor.numpy().reshape(shape.numpy()), name=name)
    return ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, tensor.dtype,
        shape=shape, name=name, base_dir=tensor.base_dir,
    )  # fmt: skip


def write_companions(
    folder: Path, manifest: Manifest, source: ModelFolder | None, recipe_yaml: str, report: dict
) -> None:
    """Configs, tokenizer, licence, recipe, manifest and report beside the model."""
    manifests.save(manifest, folder)
    (folder / manifests.RECIPE_FILE).write_text(recipe_yaml, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if source is None:
        return
    copy_companions(folder, source, _COPIED)
    if manifest.kind == "decoder":
        _write_genai(folder, manifest, source)


def _write_genai(folder: Path, manifest: Manifest, source: ModelFolder) -> None:
    """What onnxruntime-genai needs to run the export, which is whole without it."""
    config, generation = (read_json(folder / n) if (folder / n).exists() else {} for n in _COPIED)
    tokenizer = source.tokenizer()
    end = None if tokenizer is None else tokenizer.eos_token_id
    try:
        contents = genai_config(manifest, config, generation, end)
    except InputError as error:
        warn(f"{manifests.GENAI_FILE} is left out: {error}")
    else:
        (folder / manifests.GENAI_FILE).write_text(json.dumps(contents, indent=2) + "\n")


def copy_companions(folder: Path, source: ModelFolder, names: Iterable[str]) -> None:
    """These files of a model, its licence and its tokenizer, as far as it has them."""
    for name in (*names, *LEGAL_FILES):
        if (source.path / name).is_file() and (name != GENERATION or generation_config(source.path)):
            shutil.copyfile(source.path / name, folder / name)
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        write_tokenizer(tokenizer, source.path, folder)
