"""What commands share: the application, options, and what to do once libraries are imported."""

import gc
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize PyTorch models and run them in ONNX Runtime.",
)
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that come with qexport.")
app.add_typer(recipes_app, name="recipes")

Model = Annotated[str, typer.Argument(help="Hugging Face id, folder with safetensors, or GGUF file.")]
Folder = Annotated[Path, typer.Argument(help="Folder that `qexport export` wrote.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="Preset, scheme, or YAML file; see `qexport recipes list`.")
]
Target = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[
    str | None, typer.Option(help="For cuda, of what stays float: float16 (without this option) or bfloat16.")
]
Attention = Annotated[
    str, typer.Option(help="grouped (GroupQueryAttention, a shared cache) or standard (ONNX Attention, portable).")
]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Threads = Annotated[int | None, typer.Option(help="Threads of ONNX Runtime; by default all physical cores.")]
Calibration = Annotated[
    str | None,
    typer.Option(help="A text file, self, random, or datasets:NAME:SPLIT:COLUMN; by default what the recipe says."),
]
CalibrationSamples = Annotated[int | None, typer.Option(help="Calibration sequences.")]
CalibrationLength = Annotated[int | None, typer.Option(help="Tokens in a calibration sequence.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Provider = Annotated[
    str | None,
    typer.Option(help="Execution provider, instead of the one the export was made for: cpu, cuda, or its full name."),
]


def imported() -> None:
    """Collect garbage from now on, but never look at what was imported: it lives as long as the process."""
    gc.freeze()
    gc.enable()
