"""What in this machine's installation stands between a user and a running model, and what to do about it."""

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from ..artifact import checksums
from ..artifact.manifest import CPU, CUDA
from ..artifact.output import check_there
from ..artifact.ownership import foreign
from ..errors import INSTALL_RUNTIME
from .processor import instruction_sets

# Distributions that unpack into the same Python package, so that only the last one installed is whole.
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")
GENAIS = ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml")
MIN_PYTHON = (3, 11)
MIN_FREE_DISK = 10 * 2**30
MIN_FREE_MEMORY = 2 * 2**30

_GPU_NEEDS = "Install an NVIDIA driver and the CUDA and cuDNN versions named above, or export with --target cpu"
_TRY_PROVIDER = """
import sys, onnxruntime as ort
from onnx import TensorProto, helper
value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "probe", [value("x")], [value("y")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
session = ort.InferenceSession(model.SerializeToString(), providers=[sys.argv[1]])
sys.exit(0 if sys.argv[1] in session.get_providers() else 3)
"""


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: what was looked at.
        ok: whether it is as it should be.
        detail: what was found.
        remedy: what to do about it; empty when ok.
        optional: qexport works without it; a missing GPU is no fault.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    optional: bool = False


def diagnose(folder: str | Path = ".", export: str | Path | None = None) -> list[Check]:
    """Look at packages, execution providers, CPU instructions, and the free disk (of `folder`) and memory.

    Args:
        export: an exported folder, whose files are compared byte by byte with what the export wrote.

    Raises:
        InputError: `export` is none.
    """
    about = [] if export is None else check_files(Path(export))
    installed = {name: version for name in (*ONNXRUNTIMES, *GENAIS) if (version := _version(name))}
    checks = [check_python(sys.version_info[:2])]
    checks += [_check_package(name) for name in ("torch", "transformers", "onnx")]
    checks += [check_onnxruntime(installed), check_genai(installed)]
    if any(name in installed for name in ONNXRUNTIMES):
        checks += [check_provider(CPU), check_provider(CUDA, optional=True)]
    checks += [check_int8(instruction_sets(), platform.machine())]
    return [*checks, _check_disk(Path(folder)), _check_memory(), *about]


def check_files(folder: Path) -> list[Check]:
    """Whether the files of an export are as they were written; the model's have to be, others may have been edited.

    Raises:
        InputError: the folder is no export, or has no checksums.
    """
    check_there(folder)
    changed, found = checksums.changed(folder), []
    for name, what in changed.items():
        vital = name.rsplit("/", 1)[-1] in checksums.MODEL_FILES
        remedy = "Copy the folder again, or export the model again" if vital else "Right if you edited it"
        found.append(Check(name, False, f"not as the export wrote it: {what}", remedy, optional=not vital))
    whole, noted = not any(not check.optional for check in found), checksums.read(folder)
    others = foreign(folder)
    found.append(Check("files of the export", whole, f"{len(noted.files if noted else ()) - len(changed)} as written"))
    if others:
        found.append(Check("files of others", True, ", ".join(others), optional=True))
    return found


def check_python(version: tuple[int, int]) -> Check:
    """Whether this Python is new enough."""
    found, wanted = ".".join(map(str, version)), ".".join(map(str, MIN_PYTHON))
    if version < MIN_PYTHON:
        return Check("python", False, found, f"Use Python {wanted} or newer")
    return Check("python", True, found)


def check_onnxruntime(installed: Mapping[str, str]) -> Check:
    """Whether exactly one flavour of ONNX Runtime is there.

    Args:
        installed: distribution name → version.
    """
    found = [name for name in ONNXRUNTIMES if name in installed]
    detail = ", ".join(f"{name} {installed[name]}" for name in found) or "not installed"
    if not found:
        return Check("onnxruntime", False, detail, INSTALL_RUNTIME)
    if len(found) > 1:
        keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found else found[0]
        return Check(
            "onnxruntime",
            False,
            f"{detail}: they overwrite each other's files",
            f"pip uninstall -y {' '.join(found)} && pip install {keep}",
        )
    return Check("onnxruntime", True, detail)


def check_genai(installed: Mapping[str, str]) -> Check:
    """Whether at most one flavour of onnxruntime-genai is there, and one that fits ONNX Runtime.

    Args:
        installed: distribution name → version.
    """
    found = [name for name in GENAIS if name in installed]
    detail = ", ".join(f"{name} {installed[name]}" for name in found) or "not installed"
    if not found:
        return Check("onnxruntime-genai", True, f"{detail} (only needed to run exports with it)", optional=True)
    runtime = {"onnxruntime-genai-cuda": "onnxruntime-gpu", "onnxruntime-genai-directml": "onnxruntime-directml"}
    if len(found) > 1:
        # The C++ library of one with the Python files of the other: tokenizers and models fail in odd ways.
        return Check(
            "onnxruntime-genai",
            False,
            f"{detail}: they overwrite each other's files",
            f"pip uninstall -y {' '.join(found)} && pip install {_fitting_genai(installed)}",
            optional=True,
        )
    wanted = runtime.get(found[0], "onnxruntime")
    if wanted not in installed and any(name in installed for name in ONNXRUNTIMES):
        return Check(
            "onnxruntime-genai",
            False,
            f"{detail}, which is made for {wanted}",
            f"pip uninstall -y {found[0]} && pip install --no-deps {_fitting_genai(installed)}",
            optional=True,
        )
    return Check("onnxruntime-genai", True, detail, optional=True)


def check_provider(provider: str, *, optional: bool = False) -> Check:
    """Whether a session really opens on an execution provider: ONNX Runtime lists providers that cannot load.

    It is tried in a process of its own, as loading a GPU library can take the process down.
    """
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _TRY_PROVIDER, provider], capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return Check(provider, False, "no answer within 120 seconds", "See whether the GPU hangs: nvidia-smi", optional)
    if probe.returncode == 0:
        return Check(provider, True, "a session opens and stays on it", optional=optional)
    remedy = _GPU_NEEDS if provider == CUDA else "Reinstall onnxruntime"
    return Check(provider, False, why_not(probe.stderr, probe.returncode), remedy, optional)


def why_not(log: str, code: int = 0) -> str:
    """The reason for a provider's refusal, in one line, out of what ONNX Runtime wrote to stderr."""
    log = re.sub(r"\x1b\[[0-9;]*m", "", log)
    reasons = []
    if library := re.search(r"with error: (\S+): cannot open shared object", log):
        reasons.append(f"the library {library[1]} is not found")
    elif library := re.search(r"Error loading \"([^\"]+)\" which (?:depends on|is missing)", log):
        reasons.append(f"the library {Path(library[1]).name} does not load")
    if failure := re.search(r"CUDA failure \d+: ([^;\n]+)", log):
        reasons.append(failure[1].strip())
    if needs := re.search(r"Require (cuDNN [^.]*\.\*? and CUDA [\d.*]*[\d*])", log):
        reasons.append(f"this build needs {needs[1]}")
    if not reasons and "not in available provider names" in log:
        reasons.append("this onnxruntime package was built without it")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return "; ".join(reasons) or (lines[-1] if lines else f"the process that tried it ended with status {code}")


def check_int8(flags: frozenset[str] | None, machine: str) -> Check:
    """Whether the CPU has dot products of 8-bit integers, which w8a8 and accuracy level 4 need to be fast.

    Args:
        flags: instruction sets as the kernel of Linux names them; None when they cannot be read.
        machine: platform.machine().
    """
    name = "int8 on the CPU"
    if flags is None:
        return Check(name, True, f"{machine}: instruction sets cannot be read on {platform.system()}", optional=True)
    arm = machine.lower() in ("aarch64", "arm64")
    known = ("asimddp", "i8mm") if arm else ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8")
    fast = [flag for flag in known if flag in flags]
    if fast:
        # Without signed x signed products a session rewrites int8 activations to uint8; a file with explicit integer
        # ops has to hold uint8 itself.
        note = "" if arm or "avx_vnni_int8" in flags else "; unsigned activations only"
        return Check(name, True, f"{', '.join(fast)}{note}", optional=True)
    saturates = "" if arm else "; w8a8 needs session.x64quantprecision=1, or 7-bit weights, not to saturate"
    return Check(name, False, f"{machine} without {' or '.join(known)}", f"Prefer w4a16 here{saturates}", optional=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check_package(name: str) -> Check:
    version = _version(name)
    return Check(name, version is not None, version or "not installed", "" if version else f"pip install {name}")


def _fitting_genai(installed: Mapping[str, str]) -> str:
    return "onnxruntime-genai-cuda" if "onnxruntime-gpu" in installed else "onnxruntime-genai"


def _check_disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    remedy = "" if free >= MIN_FREE_DISK else "An export needs room for its shards and the final file; free some"
    return Check("disk", not remedy, f"{free / 2**30:.0f} GiB free at {folder.resolve()}", remedy)


def _check_memory() -> Check:
    memory = psutil.virtual_memory()
    remedy = "" if memory.available >= MIN_FREE_MEMORY else "Close other programs; an export holds a block at a time"
    detail = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available"
    return Check("memory", not remedy, detail, remedy)
