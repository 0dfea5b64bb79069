"""Builds stand-ins for the CUDA libraries, so that ONNX Runtime's CUDA provider starts on a machine without a GPU."""

import importlib.util
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

_SOURCE = Path(__file__).with_name("stand_in.c")
# cuDNN is not linked: the provider opens it by this name and looks its functions up while it runs.
_CUDNN = "libcudnn.so.9"
# The one library whose symbols carry no version.
_DRIVER = "libcuda.so.1"


class CannotBuild(Exception):
    """Why there can be no stand-ins on this machine."""


def build_stand_ins(folder: Path) -> dict[str, str]:
    """Compiles the stand-in libraries that the installed onnxruntime-gpu asks for.

    Args:
        folder: where the libraries are written; made if it is not there.

    Returns:
        The environment for a process that opens a session on CUDAExecutionProvider.

    Raises:
        CannotBuild: this is not Linux on x86-64, a compiler or nm is missing, the installed ONNX Runtime has no CUDA
            provider, or the compiler fails.
    """
    provider = _provider_library()
    wanted = _symbols_by_library(provider)
    folder.mkdir(parents=True, exist_ok=True)
    answers = folder / "stand_in.o"
    _run("gcc", "-O1", "-fPIC", "-c", _SOURCE, "-o", answers)
    for library, symbols in wanted.items():
        _link(folder, library, symbols, answers)
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def build_tensorrt_stand_ins(env: dict[str, str], folder: Path) -> dict[str, str]:
    """Libraries for the TensorRT provider too, without which the list of all kernels cannot be had: every function of
    theirs says 0, and nothing is made with them.

    Args:
        env: what `build_stand_ins` returned; folder: its folder.

    Raises:
        CannotBuild: as `build_stand_ins`.
    """
    provider = _provider_library().with_name("libonnxruntime_providers_tensorrt.so")
    names = re.findall(r"NEEDED.*\[(libnv[^]]+)\]", _run("readelf", "-d", "-W", provider))
    listed = _run("nm", "-D", "--undefined-only", "--with-symbol-versions", provider).split()
    symbols = [name for name in listed if re.fullmatch(r"(create|get)[A-Z]\w*", name)]
    source = folder / "tensorrt.c"
    source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in symbols))
    for name in names:
        _run("gcc", "-shared", "-fPIC", source, f"-Wl,-soname,{name}", "-o", folder / name)
    return env


def _provider_library() -> Path:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise CannotBuild("the stand-ins for CUDA are for Linux on x86-64")
    if missing := [tool for tool in ("gcc", "nm", "readelf") if not shutil.which(tool)]:
        raise CannotBuild(f"the stand-ins for CUDA need {', '.join(missing)}")
    package = importlib.util.find_spec("onnxruntime")
    found = package and Path(package.origin).with_name("capi") / "libonnxruntime_providers_cuda.so"
    if not found or not found.is_file():
        raise CannotBuild("the installed onnxruntime has no CUDA provider (onnxruntime-gpu has one)")
    return found


def _symbols_by_library(provider: Path) -> dict[str, set[str]]:
    """The CUDA libraries the provider loads, each with the symbols the provider looks for in it."""
    needed = re.findall(r"NEEDED.*\[(libcu[^]]+)\]", _run("readelf", "-d", "-W", provider))
    wanted: dict[str, set[str]] = {library: set() for library in needed}
    for line in _run("nm", "-D", "--undefined-only", "--with-symbol-versions", provider).splitlines():
        name, _, version = line.split()[-1].partition("@")
        if version in wanted:
            wanted[version].add(name)
        elif not version and re.match(r"cu[A-Z]", name):
            wanted[_DRIVER].add(name)
    with provider.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        wanted[_CUDNN] = {name.decode() for name in re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", content)}
    return wanted


def _link(folder: Path, library: str, symbols: set[str], answers: Path) -> None:
    """Links one library: the answers where stand_in.c has one, a weak stub that says success for the rest."""
    names = sorted(symbols)
    stubs, exports = folder / f"{library}.c", folder / f"{library}.map"
    stubs.write_text("".join(f"__attribute__((weak)) long {name}(void) {{ return 0; }}\n" for name in names))
    listed = "global: " + "".join(f"{name}; " for name in names) if names else ""
    # The version of a CUDA symbol is the name of its library, and the provider finds no symbol without it. The driver's
    # and cuDNN's are asked for without a version, which also finds a symbol that has one.
    exports.write_text(f"{library} {{ {listed}local: *; }};\n")
    _run("gcc", "-shared", "-fPIC", stubs, answers, f"-Wl,-soname,{library}", f"-Wl,--version-script={exports}",
         "-o", folder / library)  # fmt: skip


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
