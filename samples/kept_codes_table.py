"""Models that are quantized already, exported with their codes, as a Markdown table of what is equal.

    python samples/kept_codes_table.py QUANTIZED_MODEL [QUANTIZED_MODEL ...] --text test.txt

Every tensor of codes and of scales in the file is read back from the ONNX bytes and compared with the checkpoint's.
KL is that of the deployed file, inputs of its kernels kept in float (accuracy level 1). Where
`samples/library_checkpoints.py` left what the library computes beside the checkpoint, it is from the float model with
the weights that the library dequantizes, and from the library's own run in float32; else from the model whose weights
the formula of the method gives. Codes of integer products are compared as int8.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors import safe_open
from torch import Tensor

from qexport import export, validate
from qexport.api.stages.capturing import capture_model
from qexport.artifact.manifest import LinearEntry
from qexport.cli.console import showing_progress
from qexport.formatting import megabytes
from qexport.models.coded import Given
from qexport.quant.formats import QuantizedWeight
from qexport.quant.formats.small_floats import SmallFloatFormat
from qexport.quant.metrics import kl_divergence
from qexport.recipe.recipe import Recipe
from qexport.runtime.decoder import open_decoder

HEADER = [
    "model", "checkpoint", "schemes", "equal codes", "equal scales", "KL from its weights", "from its library's run",
    "file", "kernels",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    given = parser.parse_args()

    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    for model in given.models:
        print_row(row(model, given))


def row(model: str, given: argparse.Namespace) -> list[str]:
    """What became of a model."""
    recipe = Recipe.keeping_codes().model_copy(update={"accuracy_level": 1})
    captured = capture_model(model)
    with tempfile.TemporaryDirectory(prefix="qexport-") as place, showing_progress() as progress:
        made = export(captured, recipe, out_dir=Path(place) / "out", progress=progress)
        theirs = Path(f"{model}.safetensors")
        if theirs.is_file():
            from_weights, from_run = from_library(made.folder, theirs)
        else:
            measured = validate(
                made.folder, captured, text=given.text, windows=given.windows, window=given.window, greedy=0,
                progress=progress,
            )  # fmt: skip
            from_weights, from_run = f"{measured.logits.kl_mean:.2g}", ""
        file, codes, scales = File(made.folder), 0, 0
        for p, entry in zip([p for p in made.plan if p.scheme], made.manifest.linears, strict=True):
            found = p.given.decode() if p.given else None
            if isinstance(found, Given):
                in_file = file.weight(entry, found.weight)
                rows = slice(None) if entry.makes_order is None else torch.from_numpy(entry.makes_order)
                codes += torch.equal(in_file[0], found.weight.codes[rows])
                scales += torch.equal(in_file[1], spread(found.weight, in_file[1])[rows])
    schemes = Counter(entry.scheme for entry in made.manifest.linears)
    kernels = Counter(entry.kernel for entry in made.manifest.linears)
    of = len(made.manifest.linears)
    return [
        Path(model).name, captured.origin.codes.described if captured.origin.codes else "float",
        ", ".join(f"{n} {scheme}" for scheme, n in schemes.items()) or "float", f"{codes} of {of}",
        f"{scales} of {of}", from_weights, from_run, megabytes(made.manifest.bytes["model"]),
        ", ".join(f"{n} {kernel}" for kernel, n in kernels.items()),
    ]  # fmt: skip


def from_library(folder: Path, theirs: Path) -> tuple[str, str]:
    """KL of an export from what its library computes: from the weights that it dequantizes, and from its own run."""
    with safe_open(theirs, framework="pt") as handle:
        found, said = {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata()  # noqa: SIM118
    ids, ours = found.pop("ids"), []
    decoder = open_decoder(folder)
    for window in ids:
        decoder.reset()
        ours.append(torch.from_numpy(decoder.run(window[None].numpy())[0].copy()))
    kl = {name: float(kl_divergence(want.flatten(0, 1), torch.cat(ours)).mean()) for name, want in found.items()}
    run = f"{kl['run']:.2g}" if "run" in kl else f"none: {said['why']}"
    if "as loaded" in kl:
        run += f" (as loaded {kl['as loaded']:.2g})"
    return f"{kl['weights']:.2g}", f"{run}, {said['library']}"


class File:
    """The tensors of an export, read from its bytes."""

    def __init__(self, folder: Path):
        graph = onnx.load(folder / "model.onnx").graph
        self._nodes = {node.name: node for node in graph.node}
        self._makers = {output: node for node in graph.node for output in node.output}
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}

    def weight(self, entry: LinearEntry, like: QuantizedWeight) -> tuple[Tensor, Tensor]:
        """Codes [N, K] and scales of a linear."""
        if isinstance(like.format, SmallFloatFormat):
            return self._small_floats(entry, like.format)
        node, rows = self._nodes[entry.node], slice(*(entry.columns or (0, entry.shape[0])))
        n, k = entry.shape
        if node.op_type == "MatMulBnb4":
            packed = self._read(node.input[1])
            codes = torch.stack((packed >> 4, packed & 15), -1).view(n, k)
            return codes, self._read(node.input[2]).view(n, -1)
        if node.op_type == "MatMulNBits":
            packed, bits = self._read(node.input[1]), like.format.stored_bits
            scales = self._read(node.input[2]).view(len(packed), -1)[rows]
            flat = packed.reshape(len(packed), -1)[rows]
            parts = [(flat >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
            codes = torch.stack(parts, -1).reshape(n, -1)[:, :k]
            return self._signed(codes, like, 1 << (bits - 1)), scales
        dequantize = self._makers[node.input[1]]
        codes, scales = self._read(dequantize.input[0]), self._read(dequantize.input[1])
        return codes.t()[rows].to(like.codes.dtype), scales.reshape(-1)[rows].view(n, 1)

    def _small_floats(self, entry: LinearEntry, fmt: SmallFloatFormat) -> tuple[Tensor, Tensor]:
        """The same of floats of few bits: those of one linear stand by themselves, under its name."""
        n, k = entry.shape
        parts = {}
        for part in ("weight_codes", "weight_scale", "tensor_scale"):
            names = [name for name in self._tensors if name.startswith(f"{entry.name}.{part}")]
            parts[part] = numpy_helper.to_array(self._tensors[names[0]]) if names else None
        codes = torch.from_numpy(parts["weight_codes"].view(np.uint8).copy())
        if fmt.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), -1)
        whole = None if parts["tensor_scale"] is None else torch.tensor(float(parts["tensor_scale"]))
        return codes.view(n, k), fmt.read_scale(torch.from_numpy(parts["weight_scale"].copy()), whole, n)

    @staticmethod
    def _signed(codes: Tensor, like: QuantizedWeight, middle: int) -> Tensor:
        return codes if like.zero_point is not None else (codes.to(torch.int16) - middle).to(torch.int8)

    def _read(self, name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(self._tensors[name]).copy())


def spread(weight: QuantizedWeight, in_file: Tensor) -> Tensor:
    """The scales of a weight, each as often as the file has it."""
    return weight.scale.repeat_interleave(max(1, in_file.shape[1] // weight.scale.shape[1]), 1)


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
