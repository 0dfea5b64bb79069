"""Peak memory of the numerics on large tensors, each measured in a process of its own."""

import json
import subprocess
import sys

import pytest

# Each in a process of its own, forked where everything is imported and no thread runs yet.
_SCRIPT = """
import json, os, resource, sys, torch
from qexport.quant.formats import IntegerFormat
from qexport.quant.affine import search_clip
from qexport.quant.hessian import finite
from qexport.quant.metrics import kl_divergence

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

torch.set_num_threads(1)
for work, shape in json.loads(sys.argv[1]):
    if not os.fork():
        work = eval(work)
        work(torch.ones(64, 1024))  # pages in the libraries and leaves their workspaces behind
        large = torch.ones(shape)
        before = peak()
        work(large)
        print(peak() - before, flush=True)
        os._exit(0)
    os.wait()
"""
_WEIGHT = 4 * 4096 * 2048  # bytes of the float32 weight


# What is done to a tensor of which shape, and the most bytes beside it.
_LIMITS = {
    # Codes are a quarter of the float weight; scales of groups of 32 and the ranges they come from, an eighth.
    "IntegerFormat(4, 32).round_to_nearest": ((4096, 2048), _WEIGHT // 2 + (16 << 20)),
    "lambda w: search_clip(w, IntegerFormat(4, 32, False))": ((4096, 2048), _WEIGHT // 2 + (16 << 20)),
    # A few rows in float64: a Hessian may be gigabytes.
    "finite": ((4096, 2048), _WEIGHT),
    "lambda logits: kl_divergence(logits, logits)": ((256, 100_000), 64 << 20),
}


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is POSIX")
def test_temporaries_are_bounded():
    asked = json.dumps([(work, shape) for work, (shape, _) in _LIMITS.items()])
    done = subprocess.run([sys.executable, "-c", _SCRIPT, asked], capture_output=True, text=True, check=True)
    for (work, (_, limit)), peak in zip(_LIMITS.items(), done.stdout.split(), strict=True):
        assert 0 < int(peak) <= limit, work
