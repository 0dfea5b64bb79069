"""The graph that ONNX Runtime makes of an export at every load, made once and kept beside it."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort

from ..artifact import checksums
from ..artifact import manifest as manifests
from ..artifact.files import read_json
from ..artifact.manifest import CPU, GENAI_FILE, MANIFEST_FILE, MODEL_FILE, RECIPE_FILE, Manifest
from ..artifact.output import inside
from ..artifact.ownership import copied
from ..artifact.swap import put
from ..errors import InputError, RuntimeProblem, writing_to
from . import optimized_cache as cache
from .decoder import Decoder
from .embeddings import stand_in
from .layout import DATA_FILE, SHARED_FILE, lay_out
from .session import open_session, session_options, start

_SAVING = {
    "session.optimized_model_external_initializers_file_name": DATA_FILE,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}
_TRIAL_TOKENS = 16  # a prompt, where a file tells prompts from steps
# Files beside the model that onnxruntime-genai has no use for.
_NOT_COPIED = (MANIFEST_FILE, GENAI_FILE, "report.json", RECIPE_FILE, checksums.FILE)
_COPIED_TYPES = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class OptimizedInfo:
    """What `optimize` made, and what it brings.

    Attributes:
        folder: the optimized copy; onnxruntime-genai loads it as it is where it loads the export.
        bytes: disk that the copy takes.
        shared_bytes: tensors that it reads from the data of the export, without taking disk.
        model_bytes: size of the export's model and its data.
        load_seconds: medians of loading "before", from the exported model, and "after", from the copy; files in the
            page cache.
        samples: the single loads, in turns.
    """

    folder: str
    bytes: int
    shared_bytes: int
    model_bytes: int
    load_seconds: dict[str, float]
    samples: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def optimize(folder: str | Path, *, repeats: int = 5) -> OptimizedInfo:
    """Keep the optimized graph of an export in its subfolder "optimized", where `open_session` finds it.

    The copy fits this version of ONNX Runtime and this processor; anywhere else, and after any change of the model or
    of its session entries, the folder loads as if there were none. Its weights are packed for the kernels and mapped
    from disk, so that processes share them. It is written complete or not at all, and replaces an older one.

    Args:
        folder: exported folder, writable, made for the CPU.
        repeats: loads to measure, each way; 1 or more.

    Raises:
        InputError: the folder is no export, cannot be written, was not made for the CPU, or the disk is full.
        RuntimeProblem: ONNX Runtime refuses the model, or computes other numbers from the copy.
    """
    if repeats < 1:
        raise InputError("repeats is 1 or more")
    folder = Path(folder)
    manifest = manifests.load(folder)
    shared = build(folder, manifest)
    place = folder / cache.FOLDER
    samples: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(repeats):
        for name, source in (("before", folder / MODEL_FILE), ("after", folder)):
            begin = perf_counter()
            session = open_session(source, manifest)
            samples[name].append(perf_counter() - begin)
            del session
    return OptimizedInfo(
        folder=str(place),
        bytes=sum(path.stat().st_size for path in place.iterdir() if path.name != SHARED_FILE),
        shared_bytes=shared,
        model_bytes=sum(path.stat().st_size for path in folder.glob(f"{MODEL_FILE}*")),
        load_seconds={name: median(seconds) for name, seconds in samples.items()},
        samples=samples,
    )


def build(folder: Path, manifest: Manifest) -> int:
    """Write the optimized copy and try it; returns the bytes of the tensors it shares with the export.

    Raises: as `optimize`.
    """
    place = folder / cache.FOLDER
    if manifest.provider != CPU:
        raise InputError(
            f"made for {manifest.provider}, and only graphs for the CPU can be kept",
            place=str(folder),
            remedy="Export with --target cpu",
        )
    _check_replaceable(place)
    with (
        inside(folder, "optimizing") as work,
        writing_to(folder, "Free some space: making a copy takes about five times the size of the model for a while"),
    ):
        checksums.check(folder)
        key = cache.key_of(folder, manifest, CPU)
        new = work / "new"
        new.mkdir()
        shared = _write(folder, manifest, work, new)
        _let_genai_load(folder, new)
        cache.write_key(new, key)
        _check_replaceable(place)
        put(new, place, work / "old")
    return shared


def _check_replaceable(place: Path) -> None:
    if not place.exists():
        return
    ours = copied(place)
    if not ours:
        raise InputError(
            "is not an optimized copy, so it will not be replaced", place=str(place), remedy="Move it away"
        )
    if others := sorted(path.name for path in place.iterdir() if path.name not in ours):
        raise InputError(
            f"holds {others[0]}, which is not one of the copy's files, so it will not be replaced", place=str(place),
            remedy="Move that file away",
        )  # fmt: skip


def _write(folder: Path, manifest: Manifest, work: Path, new: Path) -> int:
    model = folder / MODEL_FILE
    options = session_options(manifest)
    options.optimized_model_filepath = str(work / MODEL_FILE)
    for name, value in _SAVING.items():
        options.add_session_config_entry(name, value)
    start(model, options, CPU)
    shared = lay_out(work / MODEL_FILE, model, new)
    for file in (work / MODEL_FILE, work / DATA_FILE):
        file.unlink(missing_ok=True)
    expected = _trial(open_session(model, manifest, threads=1), manifest)
    found = _trial(start(new / MODEL_FILE, session_options(manifest, threads=1, optimized=True), CPU), manifest)
    if not all(np.array_equal(one, other, equal_nan=True) for one, other in zip(expected, found, strict=True)):
        raise RuntimeProblem(
            "ONNX Runtime computes other numbers from the optimized copy, which is therefore not kept",
            place=str(model),
            remedy=f"Run the folder as it is; this is onnxruntime {ort.__version__}",
        )
    return shared


def _trial(session: ort.InferenceSession, manifest: Manifest) -> list[np.ndarray]:
    """Outputs on random inputs, many rows at once and then one: kernels differ by that."""
    random = np.random.default_rng(0)
    if manifest.kind == "decoder":
        decoder = Decoder(session, manifest.settings, max_length=_TRIAL_TOKENS + 1, embed=stand_in(session))
        ids = random.integers(0, manifest.settings["vocab_size"], (1, _TRIAL_TOKENS + 1))
        # The logits are memory of the session.
        return [decoder.run(part).copy() for part in (ids[:, :_TRIAL_TOKENS], ids[:, _TRIAL_TOKENS:])]
    outputs = []
    for rows in (3, 1):
        feeds = {value.name: _random_input(random, value, rows) for value in session.get_inputs()}
        try:
            outputs += session.run(None, feeds)
        except Exception as error:  # onnxruntime has one exception class for each status code and no base class
            raise RuntimeProblem(f"the model fails on random inputs: {error}") from error
    return outputs


def _random_input(random: np.random.Generator, value: ort.NodeArg, rows: int) -> np.ndarray:
    shape = [size if isinstance(size, int) else rows for size in value.shape]
    name = value.type.removeprefix("tensor(").removesuffix(")")
    dtype = np.dtype({"float": "float32", "double": "float64"}.get(name, name))
    # Whole numbers may be indices, and 0 and 1 are nearly always valid ones.
    numbers = random.standard_normal(shape) if dtype.kind == "f" else random.integers(0, 2, shape)
    return np.asarray(numbers, dtype)


def _let_genai_load(folder: Path, new: Path) -> None:
    """Make the copy a folder for onnxruntime-genai, if the export is one: its files, and nothing optimized again."""
    try:
        config = read_json(folder / GENAI_FILE)
        decoder = config["model"]["decoder"]
        decoder["filename"] = MODEL_FILE
        decoder["session_options"]["graph_optimization_level"] = "ORT_DISABLE_ALL"
    except (InputError, KeyError, TypeError):
        return  # a folder that genai does not load
    (new / GENAI_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        if file.is_file() and file.suffix in _COPIED_TYPES and file.name not in _NOT_COPIED:
            shutil.copyfile(file, new / file.name)
