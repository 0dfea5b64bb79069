"""The first run of a finished file, before its folder appears.

Some faults pass ONNX's checker and the load of a session, and fail with the first run: a wrong number of scales of a
block-wise DequantizeLinear is one. Whoever gets the file must not be the one who finds them.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..artifact.dtypes import FLOATS
from ..artifact.manifest import CPU, MODEL_FILE, Manifest
from ..errors import RuntimeProblem
from .decoder import Decoder
from .embeddings import stand_in
from .session import session_options, start
from .values import value_of

# Bytes of a file from which it is not loaded as it is deployed, with a packed copy of its weights in memory, but in a
# process of its own and as it lies on disk: the memory of an export must not grow with the model.
_LARGE = 2**30
_STEPS = 2  # tokens of a prompt, where a file has one form for all of them
_FLOATS = {kind.session for kind in FLOATS.values()}
_ARRAYS = {"tensor(double)": "float64"}  # others are called alike


def run_once(folder: Path, manifest: Manifest, sizes: Mapping[str, Sequence[int]]) -> str:
    """Run a finished file once, on zeros: a decoder's prompt and a step behind it, or one call.

    Args:
        folder: where model.onnx and its data are.
        sizes: of the inputs by name, where they are not a decoder's.

    Returns:
        what was done.

    Raises:
        RuntimeProblem: ONNX Runtime refuses the file, or fails to run it.
    """
    try:
        return _run_somehow(folder, manifest, sizes)
    except RuntimeProblem as error:
        raise RuntimeProblem(
            f"the finished file does not run in ONNX Runtime {ort.__version__}: {error.message}", place=MODEL_FILE,
            remedy="Nothing was written: take another recipe, and report this as a fault of qexport",
        ) from error  # fmt: skip


def _run_somehow(folder: Path, manifest: Manifest, sizes: Mapping[str, Sequence[int]]) -> str:
    large = sum(path.stat().st_size for path in folder.glob(f"{MODEL_FILE}*")) > _LARGE
    if large and manifest.provider == CPU:
        _run_apart(folder, manifest, sizes)
        return f"ran once on {CPU}, weights not packed"
    _run(folder, manifest, sizes)
    return f"ran once on {manifest.provider}"


def _run(folder: Path, manifest: Manifest, sizes: Mapping[str, Sequence[int]], *, as_it_lies: bool = False) -> None:
    options = session_options(manifest, optimized=as_it_lies)
    if as_it_lies:
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.disable_prepacking", "1")
    session = start(folder / MODEL_FILE, options, manifest.provider)
    if manifest.kind == "decoder":
        prompt = manifest.settings.get("prompts_from", _STEPS)
        decoder = Decoder(session, manifest.settings, max_length=prompt + 1, embed=stand_in(session))
        decoder.run(np.zeros((1, prompt), np.int64))
        decoder.run(np.zeros((1, 1), np.int64))
        return
    feeds = {value.name: _example(value.name, value.type, sizes[value.name]) for value in session.get_inputs()}
    try:
        session.run_with_ort_values([value.name for value in session.get_outputs()], feeds)
    except Exception as error:  # onnxruntime has one exception class for each status code and no base class
        raise RuntimeProblem(str(error).strip()) from error


def _example(name: str, type_name: str, sizes: Sequence[int]) -> ort.OrtValue:
    """Zeros, ids of a token that every table has; a mask is of ones."""
    make = np.ones if "mask" in name else np.zeros
    if type_name in _FLOATS:
        return value_of(make(sizes, np.float32), type_name)
    dtype = _ARRAYS.get(type_name) or type_name.removeprefix("tensor(").removesuffix(")")
    return ort.OrtValue.ortvalue_from_numpy(make(sizes, dtype))


def _run_apart(folder: Path, manifest: Manifest, sizes: Mapping[str, Sequence[int]]) -> None:
    given = json.dumps([str(folder), manifest.model_dump_json(), {name: list(size) for name, size in sizes.items()}])
    done = subprocess.run([sys.executable, "-m", __name__], input=given, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the process that ran it ended with status {done.returncode}"]
        raise RuntimeProblem(said[-1])


def main() -> None:
    """What `_run_apart` starts: run the file that stdin names, and say on stderr what went wrong."""
    folder, manifest, sizes = json.load(sys.stdin)
    try:
        _run(Path(folder), Manifest.model_validate_json(manifest), sizes, as_it_lies=True)
    except RuntimeProblem as error:
        sys.exit(" ".join(error.message.split()))


if __name__ == "__main__":
    main()
