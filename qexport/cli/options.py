"""Options that several commands have, and what to do once libraries are imported."""

import gc
from pathlib import Path
from typing import Annotated, Any

import typer

import qexport

from ..errors import InputError
from ..recipe.catalogue import preset_files, wishes
from ..targets import BUILT_IN

Model = Annotated[str, typer.Argument(help="Hugging Face id, folder with safetensors, or GGUF file.")]
Folder = Annotated[Path, typer.Argument(help="Folder that `qexport export` wrote.")]
Requantize = Annotated[
    str | None,
    typer.Option(help="Of a model that is quantized already: give its codes up for those of this recipe."),
]
Target = Annotated[str, typer.Option(help=f"What the export is made for: {' or '.join(BUILT_IN)}.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Of what stays float, one that the target has, such as bfloat16 for cuda; by default its first."),
]
Attention = Annotated[
    str, typer.Option(help="grouped (GroupQueryAttention, a shared cache) or standard (ONNX Attention, portable).")
]
Form = Annotated[
    str, typer.Option(help="native (kernels of ONNX Runtime) or qdq (operators of ONNX alone, for other readers too).")
]
Opset = Annotated[int | None, typer.Option(help="Of the form qdq, 21 to 25; by default 23.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Threads = Annotated[int | None, typer.Option(help="Threads of ONNX Runtime; by default all physical cores.")]
Adapter = Annotated[
    Path | None, typer.Option(help="Folder with a LoRA adapter, merged into the weights before anything else.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", help="Folder with a LoRA adapter, merged into the weights before anything else; as NAME=DIR, as "
        "often as there are adapters, it stays apart and is switched while the file runs."
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="A text file, token ids (.npy, .bin, .safetensors), conversations (.jsonl), self, norms, random, or "
        "datasets:NAME:SPLIT:COLUMN; by default what the recipe says."
    ),
]
CalibrationSamples = Annotated[int | None, typer.Option(help="Calibration sequences.")]
CalibrationLength = Annotated[int | None, typer.Option(help="Tokens in a calibration sequence.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="Where PyTorch computes: cpu, cuda, cuda:1; whatever the target is.")]
Offload = Annotated[
    bool, typer.Option("--offload", help="With --device: activations between blocks wait in the host's memory.")
]
Provider = Annotated[
    str | None,
    typer.Option(help="Execution provider, instead of the one the export was made for: cpu, cuda, or its full name."),
]
Temperature = Annotated[
    float | None, typer.Option(help="Sample instead of taking the likeliest token; 0 does not.")
]
TopK = Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that add up to p.")]
Draft = Annotated[
    str | None,
    typer.Option(help="Guess tokens and read them together: lookup (what stood behind the last tokens before)."),
]
DraftRows = Annotated[
    int | None,
    typer.Option(help="With --draft: read so many tokens in every call, so that no guess touches a bit of the text."),
]
SamplingSeed = Annotated[int | None, typer.Option(help="Seed of sampling.")]


def recipes_beginning(incomplete: str) -> list[str]:
    """What a shell completes the name of a recipe to."""
    return sorted(name for name in {*wishes(), *preset_files()} if name.startswith(incomplete))


def sampling_of(
    temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
) -> "qexport.Sampling | None":
    """How to draw; None where nothing was asked for, or the likeliest token."""
    given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    return qexport.Sampling(**given) if given and temperature != 0 else None


def drafts_of(kind: str | None, rows: int | None) -> "qexport.Drafts | None":
    """What guesses tokens; None where nothing was asked for."""
    if kind is None:
        if rows is not None:
            raise InputError("rows belong to a draft", place="draft rows", remedy="Pass --draft lookup too")
        return None
    return qexport.Drafts(kind, rows)


def imported() -> None:
    """Collect garbage from now on, but never look at what was imported: it lives as long as the process."""
    gc.freeze()
    gc.enable()
