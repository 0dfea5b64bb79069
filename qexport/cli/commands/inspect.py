"""`qexport inspect`: what an export would do."""

from typing import Annotated

import typer

import qexport

from ..app import MAKE, command
from ..options import (
    Adapter,
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
from ..recipes import named_recipe, with_recipe


@command(MAKE)
def inspect(
    model: Model,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", help="Preset, scheme or YAML file. Default: balanced; as_stored for a model "
            "that is already quantized.", autocompletion=recipes_beginning,
        ),
    ] = None,
    requantize: Requantize = None,
    adapter: Adapter = None,
    target: Target = "cpu",
    dtype: Dtype = None,
    attention: Attention = "grouped",
    form: Form = "native",
    opset: Opset = None,
    all_layers: Annotated[
        bool, typer.Option("--all", help="One line per linear, even where layers are alike.")
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Run the float model to measure ranges of activations and what they decide.")
    ] = False,
    calibration: Calibration = None,
    samples: CalibrationSamples = None,
    sequence_length: CalibrationLength = None,
    seed: Seed = None,
    device: Device = "cpu",
    offload: Offload = False,
    runs_on: Annotated[
        str | None,
        typer.Option(
            help="For an export instead of a model: nodes that webgpu (coreml, directml, openvino, "
            "qnn) has no kernel for."
        ),
    ] = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Show what an export would do. No weight is read unless it calibrates: --calibrate, or a calibration option."""
    from .. import console

    if runs_on is not None:
        from ..printers.inspect import print_runs_on

        placed = qexport.runs_on(model, runs_on)
        console.print_json(placed.as_dict()) if as_json else print_runs_on(placed)
        return
    given = {"samples": samples, "sequence_length": sequence_length, "seed": seed}
    named = named_recipe(recipe, requantize)
    console.quiet_libraries()
    from ..printers.inspect import print_inspection

    imported()
    source, chosen = with_recipe(model, named, trust_remote_code, adapter)
    chosen = chosen.with_calibration(**given)
    with console.showing_progress() as progress:
        found = qexport.inspect(
            source, chosen, target=target, dtype=dtype, attention=attention, requantize=requantize is not None,
            trust_remote_code=trust_remote_code, calibrate=calibrate or any(v is not None for v in given.values()),
            calibration=calibration, progress=progress, device=device, offload=offload,
            form=form, opset=opset,
        )  # fmt: skip
    if as_json:
        console.print_json(found.as_dict())
    else:
        print_inspection(found, all_layers)
