"""Train a small convolutional network on images drawn here, quantize it to 8 bits, and run the file with ONNX Runtime.

python samples/vision.py
"""

import argparse
import statistics
import time

import numpy as np
import torch
from torch import nn

import qexport  # isort: skip  before ONNX Runtime, whose telemetry it turns off
import onnxruntime

SHAPES = ("disc", "ring", "square", "frame", "cross", "stripes")


class Block(nn.Module):
    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inside, out, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in range(2))
        self.beside = nn.Conv2d(inside, out, 1, stride)

    def forward(self, x):
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(y)) + self.beside(x))


class Classifier(nn.Module):
    """Images [batch, 1, height, width] to one number for each shape."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width, width, 2), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, len(SHAPES))

    def forward(self, image):
        return self.head(self.blocks(torch.relu(self.stem(image))).mean((2, 3)))


def drawn(count: int, seed: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of random size, place and brightness in noise: images [count, 1, size, size], and which they are."""
    random = torch.Generator().manual_seed(seed)
    kind = torch.randint(len(SHAPES), (count,), generator=random)
    centre = size * (0.35 + 0.3 * torch.rand(count, 2, 1, 1, generator=random))
    radius = size * (0.15 + 0.15 * torch.rand(count, 1, 1, generator=random))
    light = 0.5 + torch.rand(count, 1, 1, generator=random)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    y, x = (y - centre[:, 0]) / radius, (x - centre[:, 1]) / radius
    far, wide = (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs())
    masks = torch.stack([
        far < 1, (far < 1) & (far > 0.6), wide < 0.9, (wide < 0.9) & (wide > 0.6),
        (wide < 1) & (torch.minimum(x.abs(), y.abs()) < 0.25), (wide < 0.9) & ((2.5 * y).floor() % 2 == 0),
    ])  # fmt: skip
    noise = 0.35 * torch.randn(count, size, size, generator=random)
    return (light * masks[kind, torch.arange(count)] + noise)[:, None], kind


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        images, kinds = drawn(64, seed=step)
        loss = nn.functional.cross_entropy(model(images), kinds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of every file; their median counts")
    given = parser.parse_args()

    torch.manual_seed(0)
    model = Classifier()
    train(model, given.steps)

    calibration = [{"image": drawn(64, seed=10_000 + i)[0]} for i in range(4)]
    images, kinds = drawn(2000, seed=20_000)
    recipes = {
        "float32": qexport.Recipe(scheme="w8a8_static", overrides=[{"match": "*", "scheme": "float"}]),
        "w8a8_static": qexport.Recipe(scheme="w8a8_static"),
    }
    sessions, answers = {}, {}
    print("| file | bytes | QLinearConv | right | logits, SQNR | speed |\n| --- | --- | --- | --- | --- | --- |")
    for name, recipe in recipes.items():
        result = qexport.export(
            model, recipe, out_dir=f"out/vision/{name}", example_inputs=calibration[0], calibration=calibration,
            dynamic_shapes={"image": {0: "batch", 2: "height", 3: "width"}}, overwrite=True,
        )  # fmt: skip
        report = qexport.validate(result.folder, model, inputs=[{"image": images[:256]}])
        sessions[name] = open_file(result)
        (answers[name],) = sessions[name].run(None, {"image": images.numpy()})
        answers[name] = (result, report, np.mean(answers[name].argmax(1) == kinds.numpy()))
    seconds = timed(sessions, images[:64].numpy(), given.repeats)
    for name, (result, report, right) in answers.items():
        row = report.outputs[0]
        quality = "equal" if row.sqnr_db is None else f"{row.sqnr_db:.1f} dB"
        convolutions, speed = report.placement.op_counts.get("QLinearConv", 0), seconds["float32"] / seconds[name]
        size = result.manifest.bytes["model"]
        print(f"| {name} | {size} | {convolutions} | {right:.1%} | {quality} | {speed:.2f} |")
    print()
    for line in answers["w8a8_static"][1].verdict:
        print(f"- {line}")


def open_file(result) -> onnxruntime.InferenceSession:
    """The file needs nothing of qexport; its session options are in manifest.json."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in result.manifest.session.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(result.folder / "model.onnx", options, providers=[result.manifest.provider])


def timed(sessions, images: np.ndarray, repeats: int) -> dict[str, float]:
    """Median CPU seconds of every file, run in turns."""
    taken = {name: [] for name in sessions}
    for _ in range(repeats):
        for name, session in sessions.items():
            started = time.process_time()
            session.run(None, {"image": images})
            taken[name].append(time.process_time() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    main()
