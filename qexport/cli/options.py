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
    typer.Option(help="For a model that is already quantized: replace its codes by those of this recipe."),
]
Target = Annotated[str, typer.Option(help=f"What the export is made for: {' or '.join(BUILT_IN)}.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Dtype of what stays float, such as bfloat16 for cuda. Default: the target's first."),
]
Attention = Annotated[
    str, typer.Option(help="grouped (GroupQueryAttention, a shared cache) or standard (ONNX Attention, portable).")
]
Form = Annotated[
    str, typer.Option(help="native (kernels of ONNX Runtime) or qdq (operators of ONNX alone, for other readers too).")
]
Opset = Annotated[int | None, typer.Option(help="Opset of the form qdq, 21 to 25. Default: 23.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Threads = Annotated[int | None, typer.Option(help="Threads for ONNX Runtime. Default: all physical cores.")]
Adapter = Annotated[
    Path | None, typer.Option(help="Folder with a LoRA adapter, merged into the weights before anything else.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", help="Folder with a LoRA adapter, merged into the weights before anything else. With NAME=DIR, "
        "once per adapter, it is kept apart and can be switched at run time."
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
Device = Annotated[str, typer.Option(help="Device that PyTorch computes on, whatever the target: cpu, cuda, cuda:1.")]
Offload = Annotated[
    bool, typer.Option("--offload", help="With --device: keep activations between blocks in the host's memory.")
]
Provider = Annotated[
    str | None,
    typer.Option(help="Execution provider, instead of the one the export was made for: cpu, cuda, or its full name."),
]
Temperature = Annotated[
    float | None, typer.Option(help="Temperature of sampling; 0 takes the likeliest token.")
]
TopK = Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that add up to p.")]
Draft = Annotated[
    str | None,
    typer.Option(help="Guess tokens and check them together: lookup (what followed the last tokens earlier)."),
]
DraftRows = Annotated[
    int | None,
    typer.Option(help="With --draft: read this many tokens in every call, so that no guess changes the text."),
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
            raise InputError("rows only go with a draft", place="draft rows", remedy="Pass --draft lookup too")
        return None
    return qexport.Drafts(kind, rows)


def imported() -> None:
    """Collect garbage from now on, but never look at what was imported: it lives as long as the process."""
    gc.freeze()
    gc.enable()
