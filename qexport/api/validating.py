"""Validate: an export beside the float model it was made from, whatever kind of model that is."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..capture.graph import CapturedModel
from ..capture.module import Inputs
from ..models.source import ModelFolder, with_adapter
from ..progress import Progress, no_progress
from ..runtime.provider import provider_named
from ..runtime.seq2seq import is_seq2seq
from ..runtime.vision_language import is_vision_language
from ..validation.foreign import is_foreign
from ..validation.gates import Gates
from ..validation.report import Report
from .foreign import validate_foreign
from .measuring import validate_file, validate_with_adapter
from .options import ValidationOptions
from .seq2seq.validating import validate_parts
from .vision_language.validating import validate_pictures


def validate(
    folder: str | os.PathLike[str],
    reference: str | os.PathLike[str] | ModelFolder | torch.nn.Module | CapturedModel,
    *,
    text: str | os.PathLike[str] | None = None,
    windows: int = 8,
    window: int | None = None,
    inputs: Sequence[Inputs] | Sequence[str] | torch.Tensor | None = None,
    threads: int | None = None,
    provider: str | None = None,
    references: bool = False,
    greedy: int = 32,
    sensitivity: bool = False,
    max_kl: float | None = None,
    max_ppl_rise: float | None = None,
    min_top1: float | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
    device: str = "cpu",
    out: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    active: str | None = None,
) -> Report:
    """Compare an export with the float model it was made from, and write the result into its report.json.

    report.html shows it, and the model card gets its numbers.

    The float model itself is compared first with a witness that reads it too: transformers' model of the same folder,
    or the module. The deployed file runs in ONNX Runtime with the session options of its manifest; the float model runs
    in PyTorch in float32, one block in memory at a time.

    The parts of an encoder-decoder are compared each alone, on what the float model hands to it, and both together on
    what the float model writes about the sources: the export reads these itself and goes through the texts token by
    token. The report is of both together; those of the parts are in it, and in their folders. A model of pictures and
    text is compared in the same way: its three parts, and all of them on prompts with pictures, by the logits of the
    text that follows these.

    Args:
        folder: what `export` wrote; it has to be writable. Or an ONNX file of a language model by another tool, or its
            folder: its linears are found by their weights, and the same is compared.
        reference: the model that was exported: a Hugging Face id, a folder, a GGUF file, an nn.Module, or a captured
            model (whose weights stay unloaded). Of an encoder-decoder an id or a folder.
        text: a UTF-8 file or a string; of an encoder-decoder of spectrograms a safetensors file of them; of a model of
            pictures and text a text, whose stretches go with drawn pictures, or a .jsonl file of pairs. None: the float
            model writes the text (an encoder reads random tokens), and the report says so.
        windows: how many stretches of the text, each of which stands alone; of an encoder-decoder, how many sources.
        window: tokens in each; None: 512, and 128 in the sources of an encoder-decoder.
        inputs: for models without text: the tensors of one forward call each, in order or by name. For an
            encoder-decoder the sources themselves: texts, or spectrograms [n, bins, frames].
        threads: threads within an ONNX Runtime operator.
        provider: execution provider: cpu, cuda, or ONNX Runtime's name; None takes the one the file was made for.
        references: also measure how far other forms of the float model are from float32 in PyTorch on the same windows:
            float16 in PyTorch, and the float model in ONNX Runtime, exported like this export (for a while this takes
            the disk of the float model). It takes a float16 kernel of PyTorch for every operator.
        greedy: new tokens that both models write greedily after the first 64 tokens of the first 4 windows, to see
            where they part; 0 for none. Of an encoder-decoder, those that are written about each source: 2 or more.
        sensitivity: also measure what each linear costs in KL, restore the costliest to float in turn, and suggest
            overrides for the recipe. It runs the float model forward and back.
        max_kl: largest mean KL that the export should have, in nats a token. Of this limit and the next two the
            report's `gates` say whether they were kept; to miss one is no error.
        max_ppl_rise: largest relative rise of perplexity, 0.05 for 5 %.
        min_top1: least share of tokens for which both find the same one likeliest, 0 to 1.
        trust_remote_code: run Python code that comes with the reference.
        progress: called with (stage, what, done, total).
        device: where PyTorch computes the float model, by its name of it: "cpu", "cuda", "cuda:1".
        out: folder for the report of a file of another tool; None: beside it.
        adapter: a folder with a LoRA adapter: the reference is the model with it.
        active: the name of the same adapter in an export that keeps it apart: it runs with it. The page goes to `out`.

    Raises:
        InputError: the folder is no export, and no model of another tool, or gives the last logits only, the reference
            is another model, the text does not do, a limit is none, or something that was asked for means nothing for
            such a model.
        CaptureError: the float model's graph is not what its witness computes, see `reader.check_reader`.
        RuntimeProblem: ONNX Runtime refuses the model or does not have the provider.
    """
    reference = with_adapter(reference, adapter, trust_remote_code)
    options = ValidationOptions(
        text=text, windows=windows, window=window, inputs=inputs, threads=threads,
        provider=None if provider is None else provider_named(provider), references=references, greedy=greedy,
        sensitivity=sensitivity, trust_remote_code=trust_remote_code, progress=progress, device=device,
        gates=Gates(max_kl, max_ppl_rise, min_top1),
        out=None if out is None else Path(out),
    )  # fmt: skip
    place = Path(folder)
    if active is not None:
        return validate_with_adapter(place, active, reference, options)
    if is_foreign(place):
        return validate_foreign(place, reference, options)
    if is_vision_language(place):
        return validate_pictures(place, reference, options)
    return validate_parts(place, reference, options) if is_seq2seq(place) else validate_file(place, reference, options)
