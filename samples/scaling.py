"""What an export takes in several processes, where the time goes, and how equal the results are, as a Markdown table.

    python samples/scaling.py MODEL --text wikitext-2-valid.txt --ranks 1 2 4 [--recipe w4a16_g32]

The first half of the text's lines calibrates, windows of the second are measured. Every export is run by torchrun, with
one thread a process; on a machine with fewer free cores than processes seconds say nothing, and the rest still does.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx
import torch

from qexport.api.stages.capturing import capture_model
from qexport.artifact import manifest as manifests
from qexport.artifact.manifest import MODEL_FILE
from qexport.runtime.tensors import tensor_of
from qexport.validation.formatting import number, with_error
from qexport.validation.logits import compare_logits, deployed_logits
from qexport.validation.reference import FloatOutputs, decoder_feeds
from qexport.validation.text import choose_text

_KINDS = ("INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8")
_INTEGERS = {getattr(onnx.TensorProto, kind) for kind in _KINDS if hasattr(onnx.TensorProto, kind)}
_STAGES = ("capture", "calibrate", "quantize", "lower", "package")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--recipe", default="w4a16_g32")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    given = parser.parse_args()

    captured = capture_model(given.model)
    with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
        place = Path(folder)
        lines = given.text.read_text("utf-8").splitlines(keepends=True)
        for name, part in (("first", lines[: len(lines) // 2]), ("second", lines[len(lines) // 2 :])):
            (place / f"{name}.txt").write_text("".join(part), "utf-8")
        text = choose_text(captured, place / "second.txt", given.windows, given.window, lambda *_: None)
        reference = FloatOutputs(captured, decoder_feeds(captured, text.windows), ("logits",))
        data = f"{given.samples} x {given.sequence_length} tokens"
        print(f"{captured.folder.name}, {given.recipe}, {data}; {text.described}\n")
        print_row(["ranks", "wall s", "CPU s of all", *(f"{stage}, s" for stage in _STAGES), "codes equal", "KL"])
        print_row(["---"] * (5 + len(_STAGES)))
        for count in given.ranks:
            out = place / str(count)
            wall, cpu = run(count, [
                given.model, "-o", out, "--recipe", given.recipe, "--calibration", place / "first.txt",
                "--samples", given.samples, "--sequence-length", given.sequence_length,
            ])  # fmt: skip
            seconds = json.loads((out / "report.json").read_text("utf-8"))["export"]["seconds"]
            scores = compare_logits(reference, text.windows, deployed_logits(out, manifests.load(out), given.window))
            print_row([
                str(count), f"{wall:.0f}", f"{cpu:.0f}", *(f"{seconds[stage]:.0f}" for stage in _STAGES),
                f"{equal_codes(out, place / str(given.ranks[0])):.4%}", with_error(scores.kl_mean, scores.kl_error),
            ])  # fmt: skip
            print(f"KL of {count}: {number(scores.kl_mean)}", file=sys.stderr, flush=True)


def run(count: int, arguments: list) -> tuple[float, float]:
    """Export in `count` processes; wall and processor seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, "-m", "qexport", "export"]
    done = subprocess.run(list(map(str, [*launch, *arguments])), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu


def equal_codes(folder: Path, other: Path) -> float:
    """The share of integers that are the same in two exports."""
    equal = count = 0
    for one, two in zip(codes(folder), codes(other), strict=True):
        equal, count = equal + int((one == two).sum()), count + one.numel()
    return equal / count


def codes(folder: Path):
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    for tensor in sorted(graph.initializer, key=lambda t: t.name):
        if tensor.data_type in _INTEGERS and tensor.dims:
            yield torch.from_numpy(tensor_of(tensor, folder).astype("int16"))


def print_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
