"""Every kind of scheme on a GPU: is it right, where does it run, how fast is it. Writes a Markdown file.

    python samples/gpu_check.py MODEL [--text test.txt] [--recipes w4a16_g32 ...] [--out samples/results/gpu_check.md]

MODEL is a Hugging Face id or a folder. Each recipe is exported for CUDA and its file run there: compared with the
quantized graph that it was written from (run by PyTorch on the CPU) and with the float model in PyTorch, float16 on the
same GPU; and timed in turns with a float16 file of the same model. The share of the bandwidth is the bytes of weights
and cache that a token needs, times tokens a second, over what copying within the device's memory reaches. Recipes with
float inputs are measured in bfloat16 too, those of `--bfloat16`.
`--cpu` does all of it on the CPU provider, to see that it runs; without MODEL on a tiny random model. That provider
runs no bfloat16 file: of those there is the graph only.
"""

import argparse
import copy
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import onnx
import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import qexport  # isort: skip  before ONNX Runtime, whose telemetry it turns off
import onnxruntime as ort

from qexport.api.stages import lowering
from qexport.api.stages.capturing import capture_model
from qexport.artifact.manifest import CPU, CUDA, MODEL_FILE
from qexport.calibrate.block_activations import decoder_inputs
from qexport.cli.console import showing_progress
from qexport.errors import InputError, QExportError
from qexport.formatting import megabytes
from qexport.graph.edit import attributes, get_tensor, set_tensor
from qexport.lower.lowered_block import LoweredBlock
from qexport.quant.metrics import kl_divergence, top1_agreement
from qexport.quant.narrowing import narrowed
from qexport.recipe.recipe import Override, Recipe
from qexport.runtime.decoder import open_decoder
from qexport.validation.logits import deployed_logits
from qexport.validation.placement import examine
from qexport.validation.text import choose_text

RECIPES = (
    "w4a16_g32", "w4a16_g32_asym", "w8a16", "w8a8_dyn", "w8a8_static", "w4a8", "nf4", "fp4", "crossquant_w8a8",
    "w4a16_g64_lorc", "w2a16_g64",
)  # fmt: skip
BFLOAT16 = ("w4a16_g32", "w4a16_g32_asym", "w8a16", "nf4", "w4a16_g64_lorc", "w2a16_g64")
BITS = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal on the CPU provider")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--bfloat16", nargs="*", help="recipes, by default some of --recipes")
    parser.add_argument("--text", help="UTF-8 text to measure on; by default the model writes its own")
    parser.add_argument("--calibration", help="UTF-8 text; by default the model writes its own")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, default=256, help="tokens in a window")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of as many tokens")
    parser.add_argument("--prompts", nargs="+", type=int, default=(128, 512, 2048))
    parser.add_argument("--pasts", nargs="+", type=int, default=(128, 2048))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="by default samples/results/gpu_check.md; a rehearsal is printed only")
    given = parser.parse_args()
    out = given.out or (None if given.cpu else Path(__file__).parent / "results" / "gpu_check.md")
    missing = "" if given.cpu else why_no_gpu()
    if missing or not (given.model or given.cpu):
        raise InputError(missing or "no MODEL given")
    loaded = {n: Recipe.load(n).with_calibration(samples=given.samples, sequence_length=given.window)
              for n in given.recipes}  # fmt: skip
    brain = [n for n in BFLOAT16 if n in loaded] if given.bfloat16 is None else given.bfloat16
    if unknown := set(brain) - set(loaded):
        raise InputError(f"not among --recipes: {', '.join(sorted(unknown))}", place="--bfloat16")
    rows = [(name, dtype) for name in loaded for dtype in ("float16", *(["bfloat16"] if name in brain else []))]
    with tempfile.TemporaryDirectory(prefix="qexport-") as folder, showing_progress() as progress:
        given.model = given.model or tiny_model(Path(folder) / "tiny")
        check = Check(given, Path(folder), progress)
        lines = check.heading()
        for name, dtype in rows:
            title = name if dtype == "float16" else f"{name}, {dtype}"
            try:
                lines.append(row([title, *check.measured(name, loaded[name], dtype)]))
            except QExportError as error:  # of one recipe; the others are worth knowing
                lines.append(row([title, f"failed: {' '.join(str(error).split())}"]))
            if out is not None:  # after every recipe, so that an interruption costs one
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if any("| failed: " in line for line in lines):
        sys.exit(1)


def filled(lowered: LoweredBlock) -> LoweredBlock:
    """A block as it was written, with its tensors."""
    module = copy.deepcopy(lowered.module)
    for name in attributes(module.graph):
        set_tensor(module, name, narrowed(lowered.read(name), get_tensor(module, name).dtype, name))
    return replace(lowered, module=module, inputs=list(lowered.inputs), outputs=list(lowered.outputs))


class Check:
    """What all recipes are measured with: the text, the float model's logits on it, a float16 file."""

    def __init__(self, given: argparse.Namespace, folder: Path, progress):
        self._given, self._folder, self._progress = given, folder, progress
        self._provider, self._device = (CPU, "cpu") if given.cpu else (CUDA, "cuda")
        captured = capture_model(given.model)
        self._text = choose_text(captured, given.text, given.windows, given.window, lambda *_: None)
        source = captured.folder.path
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).to(self._device).eval()
        with torch.no_grad():
            self._plain = [model(ids[None].to(self._device)).logits[0].float().cpu() for ids in self._text.windows]
        del model
        self._bandwidth = copy_bandwidth(self._device)
        floating = Recipe(scheme="w8a8_dyn", overrides=(Override(match="*", scheme="float"),))
        qexport.export(given.model, floating, out_dir=folder / "float16", target="cuda", progress=progress)
        open_decoder(folder / "float16", provider=self._provider, max_length=1)  # a bad installation shows now

    def heading(self) -> list[str]:
        given = self._given
        name = "the CPU provider, a rehearsal" if given.cpu else torch.cuda.get_device_name()
        versions = f"ONNX Runtime {ort.__version__}, PyTorch {torch.__version__}, qexport {qexport.__version__}"
        columns = ["recipe", "KL, top-1, max error: from its graph", "from PyTorch float16", "nodes", "copies",
                   "unfused", "fast shape", *(f"prefill {n}" for n in given.prompts),
                   *(f"decode after {n}" for n in given.pasts), "memory",
                   *(f"of bandwidth, {n}" for n in given.pasts)]  # fmt: skip
        return [
            f"# {Path(given.model).name} on {name}", "",
            f"{versions}; {self._text.described}; copying reaches {self._bandwidth / 1e9:,.0f} GB/s.",
            "Tokens/s with batch 1, and in brackets how many times the float16 file's; errors in units of a logit.", "",
            row(columns), row(["---"] * len(columns)),
        ]  # fmt: skip

    def measured(self, name: str, recipe: Recipe, dtype: str) -> list[str]:
        """The cells of a recipe; few where the provider does not run the file.

        Raises:
            QExportError: it cannot be exported, loaded or run.
        """
        given, out = self._given, self._folder / f"{name}-{dtype}"
        manifest, graph = self._export(recipe, out, dtype)
        if given.cpu and dtype == "bfloat16":
            return ["CUDA only", f"the graph: {compared(self._plain, [graph(ids) for ids in self._text.windows])}"]
        run = deployed_logits(out, manifest, given.window, provider=self._provider)
        ran = [run(ids) for ids in self._text.windows]
        del run  # closes the session before memory is looked at
        placed, _ = examine(out, manifest, self._provider)
        nodes = ", ".join(f"{provider[: -len('ExecutionProvider')]} {n}" for provider, n in
                          placed.nodes_per_provider.items())  # fmt: skip
        choices = [linear.fast for linear in manifest.linears if linear.fast is not None]
        copies = sum(n for op, n in placed.op_counts.items() if op.startswith("Memcpy"))
        memory = self._memory(out, manifest)
        speed = qexport.bench(out, self._folder / "float16", prompt_lengths=given.prompts, decode_pasts=given.pasts,
                              repeats=given.repeats, provider=self._provider)  # fmt: skip
        rates = {f"prefill:{n}": rate for n, rate in speed.first.prefill.items()}
        rates |= {f"decode:{n}": rate for n, rate in speed.first.decode.items()}
        weights, sizes = bytes_read(out), manifest.settings
        per_token = 4 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"]  # key and value
        shares = [rate * (weights + n * per_token) / self._bandwidth for n, rate in speed.first.decode.items()]
        return [
            compared([graph(ids) for ids in self._text.windows], ran), compared(self._plain, ran), nodes, str(copies),
            str(len(placed.unfused)), f"{sum(choices)} of {len(choices)}" if choices else "",
            *(f"{rate:,.1f} ({speed.ratios[what]:.2f})" for what, rate in rates.items()),
            megabytes(memory), *(f"{100 * share:.1f} %" for share in shares),
        ]  # fmt: skip

    def _export(self, recipe: Recipe, out: Path, dtype: str):
        """The manifest, and a function from token ids to the logits of the graph that the file was written from."""
        blocks, ports, lower_blocks = [], [], lowering.lower_blocks

        def keep(captured, finished, target):
            lowered = lower_blocks(captured, finished, target)
            blocks.extend(map(filled, lowered.graphs))
            ports.append(captured)
            return lowered

        with patch.object(lowering, "lower_blocks", keep):
            manifest = qexport.export(
                self._given.model, recipe, out_dir=out, target="cuda", dtype=dtype, progress=self._progress,
                calibration=self._given.calibration,
            ).manifest  # fmt: skip

        def run(ids: torch.Tensor) -> torch.Tensor:
            feeds = decoder_inputs(ports[0], ids[None], torch.ones_like(ids[None]))
            values = {p.value: feeds[p.name] for p in ports[0].inputs}
            values = {n: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for n, v in values.items()}
            with torch.no_grad():
                for block in blocks:
                    results = block.module(*(values[name] for name in block.inputs))
                    values |= dict(zip(block.outputs, results, strict=True))
            return next(values[port.value] for port in ports[0].outputs if port.name == "logits")[0].float()

        return manifest, run

    def _memory(self, out: Path, manifest) -> int:
        """What a session with its cache takes, after the longest prompt."""
        before, longest = used_memory(self._device), max([*self._given.prompts, *self._given.pasts])
        decoder = open_decoder(out, manifest, provider=self._provider, max_length=longest)
        decoder.run(torch.zeros(1, longest, dtype=torch.int64).numpy())
        return max(used_memory(self._device) - before, 0)


def why_no_gpu() -> str:
    if CUDA not in ort.get_available_providers():
        return "this onnxruntime has no CUDA provider; install onnxruntime-gpu, or rehearse with --cpu"
    return "" if torch.cuda.is_available() else "PyTorch sees no CUDA device; to rehearse without one, use --cpu"


def tiny_model(folder: Path) -> str:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 256, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def used_memory(device: str) -> int:
    if device == "cpu":
        return psutil.Process().memory_info().rss
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written ones, of the fastest of several copies within the device's memory."""
    source = torch.zeros(1 << (26 if device == "cpu" else 30), dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), math.inf
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() / best


def bytes_read(folder: Path) -> int:
    """Of the weights that every token reads whole: not of tables, of which it reads a row."""
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    whole = {
        name for node in graph.node if node.op_type not in ("Gather", "GroupQueryAttention") for name in node.input
    }
    return sum(
        math.prod(t.dims) * BITS.get(t.data_type, 8 * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize) // 8
        for t in graph.initializer if t.name in whole
    )  # fmt: skip


def compared(want: list[torch.Tensor], got: list[torch.Tensor]) -> str:
    a, b = torch.cat(want), torch.cat(got)
    top = top1_agreement(a, b).float().mean()
    return f"{float(kl_divergence(a, b).mean()):.2g}, {100 * top:.1f} %, {float((a - b).abs().max()):.2g}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        main()
    except QExportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
