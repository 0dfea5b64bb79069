import pytest

from qexport.artifact.manifest import CPU
from qexport.runtime import doctor
from qexport.runtime.doctor import (
    check_genai,
    check_int8,
    check_onnxruntime,
    check_provider,
    check_python,
    diagnose,
    why_not,
)

MISSING_LIBRARY = (
    "\x1b[1;31m[E:onnxruntime:Default] [ONNXRuntimeError] : 1 : FAIL : Failed to load library "
    "/x/libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared object file: No such file\n"
    "\x1b[0;93m[W:onnxruntime] Failed to create CUDAExecutionProvider. Require cuDNN 9.* and CUDA 13.*. Please\n"
)


def test_two_flavours_of_onnxruntime_are_a_clash_with_the_command_that_ends_it():
    check = check_onnxruntime({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"})
    assert not check.ok
    assert check.remedy == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    assert check_onnxruntime({"onnxruntime-gpu": "1.31.1"}).ok
    assert not check_onnxruntime({}).ok


@pytest.mark.parametrize(
    ("installed", "ok", "remedy"),
    [
        ({"onnxruntime-gpu": "1"}, True, ""),
        ({"onnxruntime-gpu": "1", "onnxruntime-genai-cuda": "0"}, True, ""),
        ({"onnxruntime": "1", "onnxruntime-genai": "0"}, True, ""),
        ({"onnxruntime": "1", "onnxruntime-genai-cuda": "0"}, False, "--no-deps onnxruntime-genai"),
        ({"onnxruntime-gpu": "1", "onnxruntime-genai": "0"}, False, "--no-deps onnxruntime-genai-cuda"),
        (
            {"onnxruntime-gpu": "1", "onnxruntime-genai": "0", "onnxruntime-genai-cuda": "0"},
            False,
            "pip install onnxruntime-genai-cuda",
        ),
    ],
)
def test_flavours_of_genai_must_fit_the_one_of_onnxruntime(installed, ok, remedy):
    check = check_genai(installed)
    assert check.ok is ok
    assert check.optional
    assert check.remedy.endswith(remedy)


def test_old_python_is_found():
    assert check_python((3, 11)).ok
    assert not check_python((3, 10)).ok


def test_cpu_provider_opens_and_an_unknown_one_says_why_not():
    assert check_provider(CPU).ok
    check = check_provider("AbacusExecutionProvider")
    assert not check.ok
    assert check.remedy


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (MISSING_LIBRARY, "the library libcublasLt.so.13 is not found; this build needs cuDNN 9.* and CUDA 13.*"),
        (
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=x",
            "CUDA driver version is insufficient for CUDA runtime version",
        ),
        ("Specified provider 'X' is not in available provider names. Available", "built without it"),
        ("one\n\nthe last line\n", "the last line"),
        ("", "status -11"),
    ],
)
def test_reason_is_one_line(log, reason):
    found = why_not(log, -11)
    assert reason in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("flags", "machine", "ok", "words"),
    [
        ({"avx512_vnni", "avx_vnni"}, "x86_64", True, "unsigned activations only"),
        ({"avx_vnni", "avx_vnni_int8"}, "x86_64", True, "avx_vnni_int8"),
        ({"avx2"}, "x86_64", False, "without avx512_vnni"),
        ({"asimddp"}, "aarch64", True, "asimddp"),
        ({"fp"}, "aarch64", False, "without asimddp"),
    ],
)
def test_int8_instructions(flags, machine, ok, words):
    check = check_int8(frozenset(flags), machine)
    assert check.ok is ok
    assert words in check.detail
    assert bool(check.remedy) is not ok
    assert ("x64quantprecision" in check.remedy) is (not ok and machine == "x86_64")


def test_unreadable_flags_are_no_fault():
    assert check_int8(None, "arm64").ok


def test_diagnosis_covers_everything_and_every_fault_has_a_remedy(tmp_path):
    checks = diagnose(tmp_path)
    assert {"python", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai", CPU, "disk", "memory"} <= {
        check.name for check in checks
    }
    assert all(bool(check.remedy) is not check.ok for check in checks)


def test_little_disk_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_FREE_DISK", 2**80)
    assert not doctor._check_disk(tmp_path).ok
