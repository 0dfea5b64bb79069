#!/usr/bin/env bash
# PyTorch 2.13.0, CPU: functional.interpolate(mode="bilinear", antialias=True) to a width of one writes the first row of the
# result into all of its rows, where channels lie in memory one after another, as they do by themselves. The same tensor
# with its channels last gives different rows, as symmetry asks for, and so do both at a width of two. So a table of positions
# that is resized for a picture one patch wide gives something else by how it lies in memory.
#
# Exits with 0 while this is so, and with 1 when a version behaves otherwise.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 torch==2.13.0
"$place/venv/bin/python" - <<'PY'
import sys

import torch
from torch.nn.functional import interpolate

table = torch.arange(27.0).reshape(1, 3, 3, 3)  # the rows of a channel differ by 3, and 4 is the middle


def resized(tensor, width):
    return interpolate(tensor, (2, width), mode="bilinear", antialias=True)[0, 0, :, 0].tolist()


forms = {"contiguous": table, "channels last": table.to(memory_format=torch.channels_last)}
print("torch", torch.__version__)
seen = {(name, width): resized(tensor, width) for name, tensor in forms.items() for width in (1, 2)}
for (name, width), rows in seen.items():
    print(f"{name}, to a width of {width}: first column {rows[0]:.3f} {rows[1]:.3f}")
ok = seen["contiguous", 1] == [2.125, 2.125] and seen["channels last", 1] == [2.125, 5.875]
ok &= seen["contiguous", 2] == seen["channels last", 2]
sys.exit(0 if ok else 1)
PY
