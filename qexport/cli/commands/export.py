"""`qexport export`: quantize a model and write it."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

import qexport

from ...errors import InputError
from ...formatting import parsed_bytes
from ..app import MAKE, command
from ..options import (
    Adapters,
    Attention,
    Calibration,
    CalibrationLength,
    CalibrationSamples,
    Device,
    Dtype,
    Form,
    Json,
    Model,
    Offload,
    Opset,
    Remote,
    Requantize,
    Seed,
    Target,
    imported,
    recipes_beginning,
)
from ..recipes import adapters_of, named_recipe, with_recipe

AUTO = "Schemes chosen by their cost (--auto)"


@command(MAKE)
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to create.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", help="Preset, scheme or YAML file. Default: balanced; compact with --auto; "
            "as_stored for a model that is already quantized.", autocompletion=recipes_beginning,
        ),
    ] = None,
    requantize: Requantize = None,
    adapter: Adapters = None,
    target: Target = "cpu",
    dtype: Dtype = None,
    attention: Attention = "grouped",
    form: Form = "native",
    opset: Opset = None,
    calibration: Calibration = None,
    samples: CalibrationSamples = None,
    sequence_length: CalibrationLength = None,
    seed: Seed = None,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto", help="Choose the scheme of every linear for --max-bytes or --max-kl.", rich_help_panel=AUTO
        ),
    ] = False,
    max_bytes: Annotated[
        str | None, typer.Option(help="Largest size of the export, such as 90MB.", rich_help_panel=AUTO)
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="The largest mean KL from the float model.", rich_help_panel=AUTO)
    ] = None,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve", help="Choose for sizes from 2 to 8 bits and measure some: KL against bytes.",
            rich_help_panel=AUTO
        ),
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(
            help="Bytes are those of keys and values of so many tokens too, whose bits are chosen with the schemes.",
            rich_help_panel=AUTO
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to measure KL on. By default the model writes its own.", rich_help_panel=AUTO),
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="Execution provider to measure KL on.", rich_help_panel=AUTO)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted export.")] = False,
    logits: Annotated[
        str, typer.Option(help="Logits in the file: all, or last (of the last token, all that generation needs).")
    ] = "all",
    max_length: Annotated[
        int | None, typer.Option(help="Longest text, in tokens; tables of positions get as many rows.")
    ] = None,
    device: Device = "cpu",
    offload: Offload = False,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Quantize a model and write it as a folder that ONNX Runtime runs."""
    from .. import console

    auto = auto or curve or any(asked is not None for asked in (max_bytes, max_kl, context))
    named = named_recipe(recipe or ("compact" if auto and requantize is None else None), requantize)
    console.quiet_libraries()
    from ..printers.export import auto_summary, export_summary, print_auto, print_export

    imported()
    merged, kept = adapters_of(adapter or [])
    source, chosen = with_recipe(model, named, trust_remote_code, merged)
    more = [] if merged is None else ["--adapter", str(merged)]
    reference = shlex.join([model, *more, *(["--trust-remote-code"] if trust_remote_code else [])])
    chosen = chosen.with_calibration(samples=samples, sequence_length=sequence_length, seed=seed)
    if auto:
        if form != "native":
            raise InputError("--auto measures native files", place="form", remedy="Export its recipe.yaml as qdq")
        if kept:
            raise InputError("--auto merges adapters and keeps none apart", place="adapter", remedy="Give one DIR")
        if resume or logits != "all" or max_length is not None:
            raise InputError(
                "--auto measures what it exports, and does not go with --resume, --logits last or --max-length"
            )
        most = None if max_bytes is None else parsed_bytes(max_bytes)
        from ...models.source import ModelFolder

        opened = source if merged and isinstance(source, ModelFolder) else model
        with console.showing_progress() as progress:
            found = qexport.export_auto(
                opened, chosen, out_dir=out, max_bytes=most, max_kl=max_kl, curve=curve, context=context,
                target=target, dtype=dtype, calibration=calibration, text=text, overwrite=overwrite,
                attention=attention, provider=provider,
                requantize=requantize is not None, trust_remote_code=trust_remote_code, progress=progress,
                device=device, offload=offload,
            )  # fmt: skip
        if as_json:
            console.print_json(auto_summary(found))
        else:
            print_auto(found, reference)
        return
    with console.showing_progress() as progress:
        result = qexport.export(
            source, chosen, out_dir=out, target=target, dtype=dtype, calibration=calibration, overwrite=overwrite,
            resume=resume, logits=logits, requantize=requantize is not None, trust_remote_code=trust_remote_code,
            attention=attention, progress=progress, device=device, offload=offload, adapters=kept,
            form=form, opset=opset, max_length=max_length,
        )  # fmt: skip
    if as_json:
        console.print_json(export_summary(result))
    else:
        print_export(result, reference)
