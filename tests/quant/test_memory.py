"""Peak memory of the numerics on large tensors, each measured in a process of its own."""

import subprocess
import sys

import pytest

_SCRIPT = """
import resource, sys, torch
from qexport.quant.formats import IntegerFormat
from qexport.quant.affine import search_clip
from qexport.quant.metrics import kl_divergence

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

torch.set_num_threads(1)
work = {work}
work(torch.ones(64, 1024))  # pages in the libraries and leaves their workspaces behind
large = torch.ones({shape})
before = peak()
work(large)
print(peak() - before)
"""
_WEIGHT = 4 * 4096**2  # bytes of the float32 weight


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is POSIX")
@pytest.mark.parametrize(
    "work, shape, limit",
    [
        # Codes are a quarter of the float weight; scales of groups of 32 and the ranges they come from, an eighth.
        ("IntegerFormat(4, 32).round_to_nearest", (4096, 4096), _WEIGHT // 2 + (16 << 20)),
        ("lambda w: search_clip(w, IntegerFormat(4, 32, False))", (4096, 4096), _WEIGHT // 2 + (16 << 20)),
        ("lambda logits: kl_divergence(logits, logits)", (256, 100_000), 64 << 20),
    ],
    ids=["round to nearest", "clip search", "kl divergence"],
)
def test_temporaries_are_bounded(work, shape, limit):
    script = _SCRIPT.format(work=work, shape=shape)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= limit
