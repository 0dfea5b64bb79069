#!/usr/bin/env bash
# PyTorch 2.13.0, ONNX 1.23.2, ONNX Runtime 1.31.1, CPU: functional.interpolate with align_corners=True. Without antialias the
# first and last pixels of the result are those of the picture, which is what the name says. With antialias=True the last
# one is not, even where a picture grows and there is nothing to average, and torch.onnx.export writes a Resize that does
# align corners: ONNX Runtime and the reference of onnx agree with each other on that file, and differ from PyTorch.
# With align_corners=False all three agree.
#
# Exits with 0 while this is so, and with 1 when a version behaves otherwise.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check \
  numpy==2.4.6 torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1
cd "$place"
ORT_DISABLE_TELEMETRY=1 "$place/venv/bin/python" - 2>/dev/null <<'PY'
import sys

import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from torch.nn import functional


class Resized(torch.nn.Module):
    def __init__(self, align_corners):
        super().__init__()
        self.options = {"size": (9, 9), "mode": "bilinear", "antialias": True, "align_corners": align_corners}

    def forward(self, x):
        return functional.interpolate(x, **self.options)


x = torch.arange(16.0).reshape(1, 1, 4, 4)
plain = functional.interpolate(x, size=(9, 9), mode="bilinear", align_corners=True)
print("torch", torch.__version__, "onnxruntime", onnxruntime.__version__)
print("corners of the picture      ", x[0, 0, 0, 0].item(), x[0, 0, -1, -1].item())
print("aligned, without antialias  ", plain[0, 0, 0, 0].item(), plain[0, 0, -1, -1].item())
ok = plain[0, 0, 0, 0] == 0 and plain[0, 0, -1, -1] == 15
for aligned in (True, False):
    model = Resized(aligned)
    want = model(x)
    torch.onnx.export(model, (x,), "resized.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession("resized.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    ran = torch.from_numpy(session.run(None, {name: x.numpy()})[0])
    said = torch.from_numpy(ReferenceEvaluator(onnx.load("resized.onnx")).run(None, {name: x.numpy()})[0])
    between, apart = (ran - said).abs().max().item(), (ran - want).abs().max().item()
    print(f"align_corners={aligned}, antialias: corners of PyTorch {want[0, 0, 0, 0]:.3f} {want[0, 0, -1, -1]:.3f}, of the file "
          f"{ran[0, 0, 0, 0]:.3f} {ran[0, 0, -1, -1]:.3f}; PyTorch and file differ by {apart:.3f}")
    ok &= between < 1e-4 and (apart > 0.1 if aligned else apart < 1e-4)
    ok &= not aligned or abs(want[0, 0, -1, -1].item() - 15) > 0.1
sys.exit(0 if ok else 1)
PY
