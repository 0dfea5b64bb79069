"""`qexport inspect`: what an export would do."""

from typing import Annotated

import typer

import qexport

from ..app import MAKE, command
from ..options import (
    Attention,
    Calibration,
    CalibrationLength,
    CalibrationSamples,
    Dtype,
    Json,
    Model,
    RecipeName,
    Remote,
    Seed,
    Target,
    imported,
)


@command(MAKE)
def inspect(
    model: Model,
    recipe: RecipeName = "w4a16_g32",
    target: Target = "cpu",
    dtype: Dtype = None,
    attention: Attention = "grouped",
    all_layers: Annotated[
        bool, typer.Option("--all", help="One line for every linear, also where layers are alike.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Run the float model for ranges of activations and what they decide.")
    ] = False,
    calibration: Calibration = None,
    samples: CalibrationSamples = None,
    sequence_length: CalibrationLength = None,
    seed: Seed = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Show what an export would do. No weight is read unless it calibrates: --calibrate, or a calibration option."""
    from .. import console

    given = {"samples": samples, "sequence_length": sequence_length, "seed": seed}
    chosen = qexport.Recipe.load(recipe).with_calibration(**given)
    console.quiet_libraries()
    from ..printers.inspect import print_inspection

    imported()
    with console.showing_progress() as progress:
        found = qexport.inspect(
            model, chosen, target=target, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code,
            calibrate=calibrate or any(v is not None for v in given.values()), calibration=calibration,
            progress=progress,
        )  # fmt: skip
    if as_json:
        console.print_json(found.as_dict())
    else:
        print_inspection(found, all_layers)
