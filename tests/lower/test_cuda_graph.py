"""A decoder's step can be a CUDA graph: every input of a fixed shape, the mask too, and nothing that reads a length.

The mask is as long as the cache and grows from the right: what is left of it is padding, which rows may have.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import qexport
from helpers import cuda_placement
from qexport.artifact import manifest as manifests
from qexport.artifact.manifest import CPU
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.runtime.cuda_graph import can_record
from qexport.runtime.session import open_session

LENGTH, PROMPT = 24, 6
PROBE = Path(cuda_placement.__path__[0]) / "graph_probe.py"


@pytest.fixture
def exported(model_folder, tmp_path):
    def make(scheme, dtype="float16"):
        calibration = CalibrationSpec(source="random", samples=2, sequence_length=8)
        recipe = Recipe(scheme=scheme, weights={"method": "rtn"}, calibration=calibration)
        out = tmp_path / scheme
        return qexport.export(model_folder("llama"), recipe, out_dir=out, target="cuda", dtype=dtype).folder

    return make


@pytest.mark.by_default("w4a16_g32-bfloat16")
@pytest.mark.parametrize(
    ("scheme", "dtype"), [("w4a16_g32", "float16"), ("w4a16_g32", "bfloat16"), ("w8a8_dyn", "float16")]
)
def test_a_step_is_recorded_without_a_copy_from_the_host_and_replayed(
    exported, cuda_placement, tmp_path, scheme, dtype
):
    env = {**cuda_placement.keywords["env"], "STAND_IN_LAUNCHES": str(tmp_path / "launches")}
    done = subprocess.run(
        [sys.executable, PROBE, exported(scheme, dtype), str(LENGTH)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen["recorded"]) > 50 and not any(line.startswith("#") for line in seen["recorded"])
    assert [line for line in seen["replayed"] if line != "# waits"] == ["# graph runs"]


def test_what_copies_from_the_host_is_not_recorded(exported, cuda_placement, tmp_path):
    env = {**cuda_placement.keywords["env"], "STAND_IN_LAUNCHES": str(tmp_path / "launches")}
    folder = exported("nf4")
    done = subprocess.run([sys.executable, PROBE, folder, str(LENGTH)], env=env, capture_output=True, text=True)
    assert "# copies to or from the host" in json.loads(done.stdout)["recorded"]
    assert not can_record(manifests.load(folder)) and can_record(manifests.load(exported("w4a16_g32")))


def test_a_mask_as_long_as_the_cache_changes_no_number(exported):
    session = open_session(exported("w4a16_g32"), threads=1, provider=CPU)
    ids = np.random.default_rng(0).integers(3, 128, (1, LENGTH))

    def logits(fixed):
        cache = {
            value.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((1, value.shape[1], LENGTH, value.shape[3]), np.float16)
            )
            for value in session.get_inputs()
            if value.name.startswith("past")
        }
        found = []
        for past, total in [(0, PROMPT), *((n, n + 1) for n in range(PROMPT, LENGTH))]:
            mask = np.ones((1, total), np.int64)
            if fixed and past:
                mask = np.pad(mask, ((0, 0), (LENGTH - total, 0)))
            binding = session.io_binding()
            binding.bind_cpu_input("input_ids", ids[:, past:total])
            binding.bind_cpu_input("attention_mask", mask)
            binding.bind_output("logits", "cpu")
            for name, value in cache.items():
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
            session.run_with_iobinding(binding)
            found.append(binding.get_outputs()[0].numpy()[0, -1])
        return np.stack(found)

    growing = logits(fixed=False)
    assert np.isfinite(growing).all() and growing.std() > 0
    assert np.array_equal(logits(fixed=True), growing)
