"""The files of an export where transformers.js looks for them, in Node.js and in browsers.

It takes `onnx/model_TYPE.onnx` by a name for the type of the weights, and learns from config.json which one there is
and that its tensors lie beside it.
"""

import json
import re
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from ..artifact import checksums
from ..artifact import manifest as manifests
from ..artifact.files import link_or_copy, read_json
from ..artifact.manifest import CPU, MODEL_FILE, Manifest
from ..artifact.scratch import scratch_folder
from ..errors import InputError

SUBFOLDER = "onnx"
CONFIG_FILE, KEY = "config.json", "transformers.js_config"
# What a type is called in the name of a file, as transformers.js 3 and 4 look for it.
SUFFIXES = {"fp32": "", "q2": "_q2", "q4": "_q4", "q8": "_quantized", "bnb4": "_bnb4"}
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE")


@dataclass(frozen=True)
class Layout:
    """What `layout` wrote.

    Attributes:
        folder: to be loaded by transformers.js, or uploaded.
        dtype: of the file, as transformers.js calls it.
        files: all of them, below the folder.
        session: session entries that the numbers depend on; a program passes them as `session_options: {extra: ...}`.
    """

    folder: str
    dtype: str
    files: tuple[str, ...]
    session: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def layout(folder: str | Path, out: str | Path) -> Layout:
    """Write an export once more, for transformers.js. Tensors are hard links where the file system has these.

    Args:
        folder: an exported decoder or encoder, made for the CPU.
        out: folder to make.

    Raises:
        InputError: the folder is no such export or was changed, or `out` is there already or cannot be written.
    """
    folder, out = Path(folder), Path(out)
    manifest = manifests.load(folder)
    _check(folder, manifest)
    checksums.check(folder)
    if out.exists() or out.is_symlink():
        raise InputError("exists already", place=str(out), remedy="Choose another folder, or move that one away")
    if not out.parent.is_dir():
        raise InputError("is not a folder", place=str(out.parent), remedy="Make it, or choose another place")
    kind = dtype_of(manifest)
    with scratch_folder(out.parent) as scratch:
        new = scratch / "new"
        (new / SUBFOLDER).mkdir(parents=True)
        graph, data = f"model{SUFFIXES[kind]}.onnx", f"model{SUFFIXES[kind]}.onnx_data"
        beside = _write_graph(folder, new / SUBFOLDER / graph, data)
        if beside:
            link_or_copy(folder / f"{MODEL_FILE}.data", new / SUBFOLDER / data)
        for name in _COPIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, new / name)
        told = {"dtype": kind, "use_external_data_format": {graph: int(beside)}}
        config = read_json(folder / CONFIG_FILE) | {KEY: told}
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        files = tuple(sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()))
        new.rename(out)
    return Layout(str(out), kind, files, dict(manifest.session))


def dtype_of(manifest: Manifest) -> str:
    """What transformers.js calls the type that most of the weights have, by their bytes."""
    sizes: Counter[str] = Counter()
    for entry in manifest.linears:
        found = re.match(r"w(\d)a", entry.scheme)
        bits = int(found[1]) if found else 0
        kind = "bnb4" if entry.kernel == "MatMulBnb4" else "q2" if bits == 2 else "q8" if bits > 4 else "q4"
        sizes[kind] += entry.bytes
    return sizes.most_common(1)[0][0] if sizes else "fp32"


def _check(folder: Path, manifest: Manifest) -> None:
    if manifest.kind not in ("decoder", "encoder"):
        raise InputError(
            f"is a {manifest.kind}, but transformers.js finds only decoders and encoders by these names",
            place=str(folder),
            remedy="Load its model.onnx with onnxruntime-node or onnxruntime-web",
        )  # fmt: skip
    if manifest.provider != CPU or manifest.dtype != "float32":
        raise InputError(
            f"is made for {manifest.provider} in {manifest.dtype}", place=str(folder),
            remedy="Export with --target cpu",
        )  # fmt: skip
    if not (folder / CONFIG_FILE).is_file():
        raise InputError("has no config.json, by which transformers.js knows a model", place=str(folder))
    if "layer_types" in manifest.settings:
        raise InputError(
            "keeps states of convolutions, which transformers.js keeps in another size", place=str(folder),
            remedy="Load its model.onnx with onnxruntime-node or onnxruntime-web",
        )  # fmt: skip
    if manifest.adapters:
        raise InputError(
            "has adapters as inputs, which transformers.js does not feed", place=str(folder),
            remedy="Merge one of them: qexport export --adapter DIR",
        )  # fmt: skip


def _write_graph(folder: Path, path: Path, data: str) -> bool:
    """Write the graph with its tensors in a file of another name; returns whether it has any outside."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    caches = [value for value in model.graph.input if value.name.startswith("past_key_values.")]
    if any(value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT for value in caches):
        raise InputError(
            "keeps its cache in codes, and transformers.js begins with one of float32", place=str(folder),
            remedy="Export without kv_cache",
        )  # fmt: skip
    places = [e for t in model.graph.initializer for e in t.external_data if e.key == "location"]
    for place in places:
        place.value = data
    onnx.save(model, path)
    return bool(places)
