"""Export: whatever kind a model is, from what a user names to the folder that ONNX Runtime runs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import ranks
from ..capture.dynamic import DynamicShapes
from ..capture.graph import CapturedModel
from ..capture.module import Inputs
from ..models.source import ModelFolder, source_path, with_adapter
from ..passes.base import GraphPass
from ..progress import Progress, no_progress
from ..recipe.recipe import Recipe
from .adapters import check_adapters, kept_adapters
from .claiming import claimed_by_first
from .options import Options
from .refusals import check_folder_writes, check_ranks
from .result import ExportResult
from .seq2seq.exporting import export_parts
from .stages import pipeline
from .stages.preparing import Request, prepare
from .vision_language.exporting import export_pictures


def export(
    model: str | os.PathLike[str] | ModelFolder | torch.nn.Module | CapturedModel,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    *,
    out_dir: str | os.PathLike[str],
    target: str = "cpu",
    dtype: str | None = None,
    calibration: Any = None,
    example_inputs: Inputs | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    overwrite: bool = False,
    resume: bool = False,
    logits: str = "all",
    seed: int | None = None,
    requantize: bool = False,
    trust_remote_code: bool = False,
    extra_passes: Sequence[GraphPass] = (),
    attention: str = "grouped",
    progress: Progress = no_progress,
    device: str = "cpu",
    offload: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    form: str = "native",
    opset: int | None = None,
    max_length: int | None = None,
) -> ExportResult:
    """Quantize a model and write it as a folder that ONNX Runtime runs.

    Before calibration the captured float graph runs beside a witness that reads the model itself: transformers' model
    of the same folder, or the module; see `validation.reader.check_reader`.

    An encoder-decoder becomes a folder with two exports: "encoder" holds the encoder and what the decoder's layers make
    of its result, "decoder" the rest with its cache. Where the recipe calibrates, the encoder reads the calibration
    data, and the decoder texts that the float model writes about them.

    A model of pictures and text becomes a folder with three: "vision" makes rows of features of pictures, "embedding"
    puts them where tokens stand for them, "decoder" reads the result with its cache. Where the recipe calibrates, each
    reads what the float ones before it make of pictures with text. Options of decoders are for the third.

    In processes that torchrun has started, one export is made by all of them: samples and weights are shared out, the
    first process writes, and the others end with `ranks.PartDone`, a SystemExit of 0. All see the same output folder.

    Args:
        model: a Hugging Face id, a folder, a GGUF file, an nn.Module (with example_inputs), or a captured model, which
            stays as it is.
        recipe: name of a preset, a scheme, a YAML file, or a Recipe; None: balanced (of an nn.Module w4a16_g32), and
            as_stored of a model that is quantized already, which keeps its codes. Its overrides match linears of both
            parts of an encoder-decoder.
        out_dir: the folder to make; it appears when everything is done.
        target: "cpu", "cuda", or the name of a target of your own (see `targets.base`).
        dtype: of what stays float, activations and cache: for cuda "float16" (None takes it) or "bfloat16", which has
            the range of float32 but 8 bits instead of 11, wants a GPU of compute capability 8.0, and has no kernels for
            quantized activations nor for weights without groups; for cpu "float32".
        calibration: a text file's path, "self", "random", "datasets:ID:SPLIT:COLUMN", a list of strings, or token ids
            [n, S]; for an nn.Module a list of inputs such as example_inputs; for an encoder-decoder of spectrograms a
            tensor of them, or the path of a safetensors file with one tensor; for a model of pictures and text pairs of
            a picture and its text, the path of a .jsonl file of such, or a text, whose stretches go with drawn
            pictures. None takes what the recipe says. Where no
            pass needs it, quantized activations are still measured on it: blocks' SQNR and the quantization kernel.
        example_inputs: of an nn.Module: the tensors of one forward call, in order, or by the names of its parameters.
        dynamic_shapes: of an nn.Module: by input name, the dimensions that may change and their names, such as
            {"x": {0: "batch", 1: "length"}}, or as torch.export takes them; None: the first dimension of every input.
        overwrite: replace an earlier export.
        resume: go on with an interrupted export of the same model, recipe and calibration.
        logits: "all", or "last" for those of the last token of a sequence only: all that generation reads, and less
            work for a prompt; such a file cannot be validated.
        seed: of everything random, in the place of the recipe's; None leaves that.
        requantize: of a model that is quantized already: its weights become float, and the recipe quantizes these.
        trust_remote_code: run Python code that comes with the model.
        extra_passes: your own passes, run on every block in float before those of the recipe (see passes/README.md).
        attention: of a decoder, "grouped" (ONNX Runtime's GroupQueryAttention, a shared cache; a model that it cannot
            serve keeps the other, and the manifest says why) or "standard" (ONNX Attention).
        progress: called with (stage, what, done, total).
        device: where PyTorch computes, by its name of it: "cpu", "cuda", "cuda:1"; nothing to do with `target`.
        offload: with a device, activations between blocks wait in the host's memory.
        adapter: a folder with a LoRA adapter as PEFT saves it, merged into the weights before anything else; the model
            is named by id, folder or file then.
        adapters: LoRA adapters that stay apart from the weights, by names for them: low-rank branches whose factors are
            inputs of the file, empty by default, and NAME.onnx_adapter for each, which ONNX Runtime and
            onnxruntime-genai load and switch. The recipe may move no factors between values and weights then.
        form: "native" for the kernels of ONNX Runtime, or "qdq" for the operators of ONNX alone, which other readers
            have too: DequantizeLinear in front of products, attention standard.
        opset: of the form qdq, 21 to 25; None takes 23. Before that attention, norms and rotary embeddings are written
            out; 2-bit codes are there in 25 only.
        max_length: of a decoder, the most tokens of a text with what follows it. Its tables of positions have as many
            rows, which of a small model with a long context are a large part of the file. None takes the model's.

    Raises:
        QExportError: one of its kinds says what is wrong, where, and what to do; CaptureError where the graph and its
            witness differ by more than rounding; InputError where an option means nothing for this kind of model.
    """
    with ranks.joined():
        options = Options(
            target=target, dtype=dtype, attention=attention, logits=logits, resume=resume, extra_passes=extra_passes,
            seed=seed, requantize=requantize, trust_remote_code=trust_remote_code,
            progress=progress if ranks.rank() == 0 else no_progress,
            device=device, offload=offload, adapters=kept_adapters(adapters or {}),
            form=form, opset=opset, max_length=max_length,
        )  # fmt: skip
        model = with_adapter(model, adapter, trust_remote_code)
        request = Request.of(model, recipe, options, calibration, example_inputs, dynamic_shapes)
        with claimed_by_first(Path(out_dir), overwrite, source_path(model)) as work:
            prepared = prepare(request)
            check_adapters(prepared)
            check_ranks(prepared)
            check_folder_writes(prepared)
            if prepared.in_three_parts:
                return export_pictures(prepared, work)
            return export_parts(prepared, work) if prepared.in_two_parts else pipeline.run(prepared, work)
