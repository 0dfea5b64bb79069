"""Recurrent networks in 8 bits, beside what onnxruntime.quantization.quantize_dynamic makes of their float files.

    python samples/recurrent.py [-o samples/results/recurrent.md]
    python samples/recurrent.py --kernels

Real networks and real speech come out of packages that pip fetches into a temporary folder: the speaker encoder of
Resemblyzer, the voice detector of Silero, utterances that pocketsphinx tests itself with. Calibration and comparison
take different utterances. A text reader (convolutions, LSTMs both ways, CTC) and a GRU have random weights, and their
rows tell speed and agreement only. Runs of all files take turns in one process, on one thread.

--kernels fetches nothing: it times one layer of the speaker encoder alone, as the operators that files are made of.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

import qexport  # isort: skip  before ONNX Runtime, whose telemetry it turns off
import onnx
import onnxruntime
from onnxruntime.quantization import quantize_dynamic

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
FLOAT = {"scheme": "w8a8_static", "overrides": [{"match": "*", "scheme": "float"}]}
ROUNDS = 15
Feeds = dict[str, torch.Tensor]


class SpeakerEncoder(nn.Module):
    """Mel spectrograms [batch, 160, 40] to a voice [batch, 256], as Resemblyzer's."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels):
        voice = torch.relu(self.linear(self.lstm(mels)[1][0][-1]))
        return voice / voice.norm(dim=1, keepdim=True)


class VoiceDetector(nn.Module):
    """576 samples at a time, and a state that goes on, to the probability of speech, as Silero's for 16 kHz."""

    def __init__(self):
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, 1, 1), nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, 2, 1), nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm_cell, self.final_conv = nn.LSTMCell(128, 128), nn.Conv1d(128, 1, 1)

    def forward(self, samples, hidden, cell):
        x = self.stft_conv(nn.functional.pad(samples[:, None], (0, 64), mode="reflect"))
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = torch.relu(conv(x))
        hidden, cell = self.lstm_cell(x.squeeze(-1), (hidden, cell))
        return self.final_conv(torch.relu(hidden)[..., None]).sigmoid().mean((1, 2)), hidden, cell


class TextReader(nn.Module):
    """Pictures of lines [batch, 1, 32, width] to the logarithms of the probabilities of letters, for CTC."""

    def __init__(self):
        super().__init__()
        sizes = [1, 32, 64, 128, 256]
        steps = [nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, sizes[1:], strict=False)]
        pools = [nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d((2, 1)), nn.MaxPool2d((4, 1))]
        pairs = zip(steps, pools, strict=True)
        self.eye = nn.Sequential(*(layer for conv, pool in pairs for layer in (conv, nn.ReLU(), pool)))
        self.lstm = nn.LSTM(256, 256, 2, bidirectional=True, batch_first=True)
        self.letters = nn.Linear(512, 97)

    def forward(self, picture):
        return self.letters(self.lstm(self.eye(picture).squeeze(2).transpose(1, 2))[0]).log_softmax(-1)


class Gated(nn.Module):
    """Features [batch, steps, 128] through two layers of 512 gated units."""

    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(128, 512, 2, batch_first=True), nn.Linear(512, 64)

    def forward(self, x):
        return self.out(self.gru(x)[0])


@dataclass
class Case:
    """A network, what it is calibrated on and compared on, and the recipes that it goes through by name."""

    name: str
    model: nn.Module
    calibration: list[Feeds]
    test: list[Feeds]
    recipes: dict[str, dict]
    axes: dict[str, dict[int, str]] = field(default_factory=dict)


def overridden(scheme: str, *floats: str) -> dict:
    """A recipe with this scheme for all but some."""
    return {"scheme": scheme, "overrides": [{"match": name, "scheme": "float"} for name in floats]}


def fetch(folder: Path) -> None:
    """Packages for this run alone: two with weights, one with speech, one that computes spectrograms."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    constrained = ["-c", str(CONSTRAINTS)]
    subprocess.run([*pip, "install", "--target", folder, *constrained, "librosa"], check=True)
    subprocess.run([*pip, "install", "--target", folder, "--no-deps", "resemblyzer", "silero-vad"], check=True)
    source = ["download", "--no-deps", "--no-binary", "pocketsphinx", "pocketsphinx", "-d", folder]
    subprocess.run([*pip, *source], check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(folder.glob("pocketsphinx*.tar.gz"))) as archive:
        members = [m for m in archive.getmembers() if "/test/data/" in m.name and m.name.endswith(("wav", "raw"))]
        archive.extractall(folder / "speech", members, filter="data")
    sys.path.append(str(folder))


def utterances(folder: Path) -> list[np.ndarray]:
    """Speech at 16 kHz, an array for every file of more than a second, as loud as Resemblyzer makes it at least."""
    import librosa
    import soundfile

    found = []
    for path in sorted((folder / "speech").rglob("*")):
        if not any(part in str(path) for part in ("cards", "librivox", "goforward", "numbers", "something", "forever")):
            continue
        if path.suffix == ".raw":
            wave, rate = np.fromfile(path, np.int16) / 32768, 16000
        elif path.suffix == ".wav":
            wave, rate = soundfile.read(path)
        else:
            continue
        wave = librosa.resample(wave.astype(np.float32), orig_sr=rate, target_sr=16000)
        if len(wave) > 16000:
            found.append(wave * max(1.0, 10 ** (-30 / 20) / np.sqrt((wave**2).mean())))
    return found


def spectrograms(wave: np.ndarray) -> list[Feeds]:
    """Windows [1, 160, 40] of an utterance, half a window apart, as Resemblyzer computes them."""
    import librosa

    mels = librosa.feature.melspectrogram(y=wave, sr=16000, n_fft=400, hop_length=160, n_mels=40)
    mels = torch.from_numpy(mels.astype(np.float32).T)
    return [{"mels": mels[None, i : i + 160]} for i in range(0, len(mels) - 159, 80)]


def speaker_encoder(folder: Path, speech: list[np.ndarray]) -> Case:
    model = SpeakerEncoder()
    stored = torch.load(folder / "resemblyzer/pretrained.pt", map_location="cpu")["model_state"]
    model.load_state_dict({name: stored[name] for name in model.state_dict()})
    windows = [spectrograms(wave) for wave in speech]
    recipes = {
        "w8a8_static, first layer float": overridden("w8a8_static", "lstm.ih_l0"),
        "w8a8_dyn, first layer float": overridden("w8a8_dyn", "lstm.ih_l0"),
        "w8a8_static": {"scheme": "w8a8_static"}, "w8a8_dyn": {"scheme": "w8a8_dyn"},
        "w4a16_g32, first layer float": overridden("w4a16_g32", "lstm.ih_l0"),
    }  # fmt: skip
    return Case("Speaker encoder (Resemblyzer)", model, sum(windows[::2], []), sum(windows[1::2], []), recipes,
                {"mels": {0: "batch", 1: "steps"}})  # fmt: skip


def voice_detector(folder: Path, speech: list[np.ndarray]) -> Case:
    from safetensors.torch import load_file

    model = VoiceDetector()
    model.load_state_dict(load_file(folder / "silero_vad/data/silero_vad_16k.safetensors"))

    def calls(wave: np.ndarray) -> list[Feeds]:
        """Calls one after another, each with the state that the float model left."""
        samples = torch.from_numpy(np.pad(wave, (64, 0)).astype(np.float32))
        hidden = cell = torch.zeros(1, 128)
        made = []
        for begin in range(0, min(len(samples) - 575, 512 * 60), 512):
            made.append({"samples": samples[None, begin : begin + 576], "hidden": hidden, "cell": cell})
            with torch.no_grad():
                _, hidden, cell = model(**made[-1])
        return made

    recipes = {"w8a8_static, spectrum float": overridden("w8a8_static", "stft_conv", "conv1"),
               "w8a8_dyn": {"scheme": "w8a8_dyn"}}  # fmt: skip
    return Case("Voice detector (Silero)", model, sum(map(calls, speech[:4:2]), []), sum(map(calls, speech[1:5:2]), []),
                recipes, {name: {0: "batch"} for name in ("samples", "hidden", "cell")})  # fmt: skip


def text_reader(random: torch.Generator) -> Case:
    pictures = [{"picture": torch.rand(1, 1, 32, 200, generator=random).round()} for _ in range(6)]
    return Case("Text reader with CTC (random weights)", TextReader(), pictures[:4], pictures[4:],
                {"w8a8_static": {"scheme": "w8a8_static"}, "w8a8_dyn": {"scheme": "w8a8_dyn"}},
                {"picture": {0: "batch", 3: "width"}})  # fmt: skip


def gated(random: torch.Generator) -> Case:
    features = [{"x": torch.randn(1, 100, 128, generator=random)} for _ in range(6)]
    return Case("GRU of 2 x 512 (random weights)", Gated(), features[:4], features[4:],
                {"w8a8_dyn": {"scheme": "w8a8_dyn"}, "w4a16_g32": {"scheme": "w4a16_g32"}},
                {"x": {0: "batch", 1: "steps"}})  # fmt: skip


def opened(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    manifest = path.parent / "manifest.json"
    if manifest.exists() and path.name == "model.onnx":
        for key, value in json.loads(manifest.read_text())["session"].items():
            options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def megabytes(path: Path) -> float:
    beside = path.with_name(path.name + ".data")
    return (path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)) / 1e6


def table(case: Case, folder: Path) -> list[str]:
    """The lines of a case: every file's size, cosine of its first output to the float model's, and time."""
    model, files = case.model.eval(), {}
    for name, recipe in {"float32": FLOAT, **case.recipes}.items():
        out = folder / f"{case.name}-{len(files)}"
        made = qexport.export(
            model, qexport.Recipe(**recipe), out_dir=out, example_inputs=case.test[0], dynamic_shapes=case.axes,
            calibration=case.calibration,
        )  # fmt: skip
        files[name] = made.folder / "model.onnx"
    for name, options in {"": {}, ", per channel": {"per_channel": True}}.items():
        path = folder / f"{case.name}-dynamic{len(name)}.onnx"
        quantize_dynamic(files["float32"], path, **options)
        files[f"quantize_dynamic{name}"] = path
    sessions = {name: opened(path) for name, path in files.items()}
    with torch.no_grad():
        wanted = [_first(model(**feeds)) for feeds in case.test]
    fed = [{name: value.numpy() for name, value in feeds.items()} for feeds in case.test]
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            begin = time.perf_counter()
            session.run(None, fed[0])
            times[name].append(time.perf_counter() - begin)
    lines = []
    for name, session in sessions.items():
        got = [torch.from_numpy(session.run(None, feeds)[0]) for feeds in fed]
        alike = _alike(wanted, got)
        fast = min(times["float32"]) / min(times[name])
        size = megabytes(files[name])
        lines.append(f"| {case.name} | {name} | {size:.2f} | {alike} | {1e3 * min(times[name]):.2f} | {fast:.2f} |")
        print(lines[-1], flush=True)
    return lines


def _first(result) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def _alike(wanted: list[torch.Tensor], got: list[torch.Tensor]) -> str:
    """Mean and least cosine of each output; of single numbers that of all of them."""
    if wanted[0].numel() == 1:
        whole = torch.nn.functional.cosine_similarity(torch.cat(wanted), torch.cat(got).view(-1), dim=0)
        return f"{whole:.4f}"
    pairs = zip(wanted, got, strict=True)
    each = [torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in pairs]
    return f"{torch.stack(each).mean():.4f}, {min(each):.4f}"


def layer(op_type: str, features: int, states: int) -> tuple[onnxruntime.InferenceSession, dict[str, np.ndarray]]:
    """A layer of random weights, one row and 160 steps, as an operator."""
    random, gates, eight = np.random.default_rng(0), 4 * states, op_type != "LSTM"

    def weight(rows: int) -> np.ndarray:
        drawn = random.normal(size=(1, gates, rows)).astype(np.float32)
        return (40 * drawn).clip(-127, 127).astype(np.int8).transpose(0, 2, 1).copy() if eight else drawn / 16

    held = {"w": weight(features), "r": weight(states), "b": np.zeros((1, 2 * gates), np.float32)}
    if eight:
        held |= {"ws": np.full((1, gates), 1e-3, np.float32), "wz": np.zeros((1, gates), np.int8)}
        held |= {"rs": held["ws"], "rz": held["wz"]}
    inputs = ["x", "w", "r", "b", *(["", "", "", "", "ws", "wz", "rs", "rz"] if eight else [])]
    node = onnx.helper.make_node(op_type, inputs, ["y"], hidden_size=states, domain="com.microsoft" if eight else "")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "layer", [value("x", onnx.TensorProto.FLOAT, [160, 1, features])],
        [value("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in held.items()],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    return session, {"x": random.normal(size=(160, 1, features)).astype(np.float32)}


def kernels() -> list[str]:
    """Rows of what a layer takes as each operator, the least of runs in turns, beside what quantize_dynamic makes."""
    made = {
        "40 features, quantize_dynamic": layer("DynamicQuantizeLSTM", 40, 256),
        "40 features, w8a8_static": layer("DynamicQuantizeLSTM", 42, 258),  # two more hold the ranges
        "40 features, float": layer("LSTM", 40, 256),
        "256 features, quantize_dynamic": layer("DynamicQuantizeLSTM", 256, 256),
        "256 features, w8a8_static": layer("DynamicQuantizeLSTM", 258, 258),
    }
    least = dict.fromkeys(made, float("inf"))
    for _ in range(4 * ROUNDS):
        for name, (session, fed) in made.items():
            begin = time.perf_counter()
            session.run(None, fed)
            least[name] = min(least[name], time.perf_counter() - begin)
    lines = []
    for name, seconds in least.items():
        beside = least[f"{name.split(',')[0]}, quantize_dynamic"]
        lines.append(f"| {name} | {1e3 * seconds:.2f} | {seconds / beside:.2f} |")
        print(lines[-1])
    return lines


HEAD = """# Recurrent networks

Made by `python samples/recurrent.py`. Cosine is that to the float model, its mean and the least of all inputs; time is
the least of {rounds} runs in turns on one thread, with one input, and "faster" how many times the float file's speed.

| network | file | MB | cosine | ms | faster |
| --- | --- | --- | --- | --- | --- |
"""

KERNELS = """
## A layer of the speaker encoder

Made by `python samples/recurrent.py --kernels`: 256 states, 160 steps of one row, the least of {rounds} runs in turns
on one thread; "beside" is the time over that of the operator as `quantize_dynamic` makes it.

| layer | ms | beside |
| --- | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="write the table there")
    parser.add_argument("--kernels", action="store_true", help="time a layer as each operator, and nothing else")
    given = parser.parse_args()
    if given.kernels:
        kernels()
        return
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetch(folder)
        speech = utterances(folder)
        makers: list[Callable[[], Case]] = [
            lambda: speaker_encoder(folder, speech), lambda: voice_detector(folder, speech),
            lambda: text_reader(random), lambda: gated(random),
        ]  # fmt: skip
        lines = [line for make in makers for line in table(make(), folder)]
    if given.out:
        made = HEAD.format(rounds=ROUNDS) + "\n".join(lines) + "\n"
        given.out.write_text(made + KERNELS.format(rounds=4 * ROUNDS) + "\n".join(kernels()) + "\n")


if __name__ == "__main__":
    main()
