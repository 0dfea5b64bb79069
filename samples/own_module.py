"""Quantize an nn.Module that is no language model, and run the file with plain ONNX Runtime.

python samples/own_module.py
"""

import numpy as np
import torch
from torch import nn

import qexport  # isort: skip  before ONNX Runtime, whose telemetry it turns off
import onnxruntime


class Classifier(nn.Module):
    """A residual network of linears over 64 features."""

    def __init__(self, features: int = 64, width: int = 256, classes: int = 10):
        super().__init__()
        self.stem = nn.Linear(features, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(4)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def main() -> None:
    torch.manual_seed(0)
    model = Classifier().eval()
    batches = [(torch.randn(32, 64),) for _ in range(8)]

    result = qexport.export(
        model, "w8a8_static", out_dir="out/own_module", example_inputs=batches[0], calibration=batches, overwrite=True
    )
    print(f"{result.folder}: {len(result.manifest.linears)} linears, {result.manifest.bytes['model'] / 1e3:.0f} kB")
    report = qexport.validate(result.folder, model, inputs=[(torch.randn(32, 64),)])
    for line in report.verdict:
        print(f"  {line}")

    # The file needs nothing of qexport; its session options are in manifest.json.
    options = onnxruntime.SessionOptions()
    for key, value in result.manifest.session.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(result.folder / "model.onnx", options, providers=[result.manifest.provider])
    x = torch.randn(1000, 64)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        want = model(x).numpy()
    print(f"same class for {np.mean(want.argmax(-1) == got.argmax(-1)):.1%} of 1000 random inputs")


if __name__ == "__main__":
    main()
