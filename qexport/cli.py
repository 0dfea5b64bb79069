"""The command line: arguments in, one call of the library, its result out."""

import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import qexport

from .errors import InputError, QExportError

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
Provider = Annotated[str | None, typer.Option(help="Execution provider, instead of the one the export was made for.")]


def main() -> None:
    """Entry point: expected errors become one line on stderr and exit code 2."""
    gc.disable()  # until everything is imported, see _imported
    try:
        app()
    except QExportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        # Leaving, Python looks through all that tracing left behind for cycles to free; the system frees it at once.
        gc.freeze()
        gc.enable()


def _imported() -> None:
    """Collect garbage from now on, but never look at what was imported: it lives as long as the process."""
    gc.freeze()
    gc.enable()


def _version(wanted: bool) -> None:
    if wanted:
        print(qexport.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
):
    pass


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", help="Preset, scheme, or YAML file; w4a16_g32 if not given, and compact with --auto."
        ),
    ] = None,
    target: Target = "cpu",
    dtype: Dtype = None,
    attention: Attention = "grouped",
    calibration: Calibration = None,
    samples: CalibrationSamples = None,
    sequence_length: CalibrationLength = None,
    seed: Seed = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Choose the scheme of every linear for --max-bytes or --max-kl.")
    ] = False,
    max_bytes: Annotated[str | None, typer.Option(help="With --auto: the most bytes, such as 90MB.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="With --auto: the largest mean KL from the float model.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="With --auto: UTF-8 text to measure KL on; by default the model writes it.")
    ] = None,
    provider: Annotated[str | None, typer.Option(help="With --auto: execution provider to measure KL on.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted export.")] = False,
    logits: Annotated[
        str, typer.Option(help="all, or last: of the last token only, which is all that generation reads.")
    ] = "all",
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Quantize a model and write it as a folder that ONNX Runtime runs."""
    from . import console

    auto = auto or max_bytes is not None or max_kl is not None
    chosen = qexport.Recipe.load(recipe or ("compact" if auto else "w4a16_g32"))
    chosen = chosen.with_calibration(samples=samples, sequence_length=sequence_length, seed=seed)
    console.quiet_libraries()
    from .reporting import auto_summary, export_summary, print_auto, print_export
    from .seq2seq import encoder_decoder

    _imported()
    if (pair := encoder_decoder(model, trust_remote_code=trust_remote_code)) is not None:
        if auto or resume or logits != "all":
            raise InputError("an encoder-decoder takes neither --auto nor --resume nor --logits last", place=model)
        from .seq2seq import printing

        with console.showing_progress() as progress:
            both = qexport.export_seq2seq(
                pair, chosen, out_dir=out, target=target, dtype=dtype, calibration=calibration, overwrite=overwrite,
                progress=progress,
            )  # fmt: skip
        if as_json:
            console.print_json(printing.summary(both))
        else:
            printing.print_exported(both)
        return
    if auto:
        if resume or logits != "all":
            raise InputError("--auto measures what it exports: it takes neither --resume nor --logits last")
        most = None if max_bytes is None else console.parsed_bytes(max_bytes)
        with console.showing_progress() as progress:
            found = qexport.export_auto(
                model, chosen, out_dir=out, max_bytes=most, max_kl=max_kl, target=target, dtype=dtype,
                calibration=calibration, text=text, overwrite=overwrite, attention=attention, provider=provider,
                trust_remote_code=trust_remote_code, progress=progress,
            )  # fmt: skip
        if as_json:
            console.print_json(auto_summary(found))
        else:
            print_auto(found)
        return
    with console.showing_progress() as progress:
        result = qexport.export(
            model, chosen, out_dir=out, target=target, dtype=dtype, calibration=calibration, overwrite=overwrite,
            resume=resume, logits=logits, trust_remote_code=trust_remote_code, attention=attention, progress=progress,
        )  # fmt: skip
    if as_json:
        console.print_json(export_summary(result))
    else:
        print_export(result)


@app.command()
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
    from . import console

    given = {"samples": samples, "sequence_length": sequence_length, "seed": seed}
    chosen = qexport.Recipe.load(recipe).with_calibration(**given)
    console.quiet_libraries()
    from .reporting import print_inspection
    from .seq2seq import encoder_decoder

    _imported()
    if (pair := encoder_decoder(model, trust_remote_code=trust_remote_code)) is not None:
        if calibrate or calibration is not None or any(v is not None for v in given.values()):
            raise InputError("ranges of an encoder-decoder are measured by its export only", place=model)
        from .seq2seq import printing
        from .seq2seq.exporting import inspect_seq2seq

        both = inspect_seq2seq(pair, chosen, target=target, dtype=dtype)
        if as_json:
            console.print_json(both.as_dict())
        else:
            printing.print_inspected(both, all_layers)
        return
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


@app.command()
def validate(
    folder: Folder,
    reference: Annotated[str, typer.Option(help="The model that was exported: id, folder or GGUF file.")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to measure on; by default text the model writes.")
    ] = None,
    windows: Annotated[int, typer.Option(help="How many windows of the text.")] = 8,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    references: Annotated[
        bool,
        typer.Option("--references", help="Also measure float16 in PyTorch and the float model in ONNX Runtime."),
    ] = False,
    greedy: Annotated[
        int, typer.Option(min=0, help="New tokens that both models write greedily, to see where they part; 0: none.")
    ] = 32,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also what each linear costs in KL, and overrides that buy it back.")
    ] = False,
    threads: Threads = None,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Compare an export with the float model: layers, logits, text. report.json and report.html keep it."""
    from . import console

    console.quiet_libraries()
    from .reporting import print_validation
    from .runtime.seq2seq import is_seq2seq

    _imported()
    if is_seq2seq(folder):
        if references or sensitivity:
            raise InputError("an encoder-decoder takes neither --references nor --sensitivity", place=str(folder))
        from .seq2seq import printing

        with console.showing_progress() as progress:
            both = qexport.validate_seq2seq(
                folder, reference, text=text, windows=windows, window=min(window, 128), new_tokens=greedy,
                threads=threads, provider=provider, progress=progress,
            )  # fmt: skip
        if as_json:
            console.print_json(both.model_dump(mode="json"))
        else:
            printing.print_validated(both)
        return
    with console.showing_progress() as progress:
        report = qexport.validate(
            folder,
            reference,
            text=text,
            windows=windows,
            window=window,
            threads=threads,
            provider=provider,
            references=references,
            greedy=greedy,
            sensitivity=sensitivity,
            progress=progress,
        )
    if as_json:
        console.print_json(report.model_dump(mode="json"))
    else:
        print_validation(report)
        print(f"\nThe page: {folder / 'report.html'}")


@app.command()
def report(
    folder: Annotated[Path | None, typer.Argument(help="Folder that `qexport validate` looked at.")] = None,
    other: Annotated[Path | None, typer.Argument(help="Another one, to compare with.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the figures as PNG; takes matplotlib.")] = None,
    study: Annotated[Path | None, typer.Option(help="JSON of `qexport study -o`, to show on the page too.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of the key validation of report.json.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a validation again, or two side by side. Nothing runs; report.html is written again from report.json."""
    from . import console

    if schema:
        from .validate import Report

        console.print_json(Report.model_json_schema())
        return
    if folder is None:
        raise InputError("no folder given", remedy="Give the folder that `qexport validate` looked at")
    from .rendering.printing import print_comparison, print_rendered, rendered_summary

    _imported()
    if other is not None:
        if study is not None:
            raise InputError("a study goes on the page of one folder", place="--study", remedy="Give one folder")
        found = qexport.compare(folder, other)
        if as_json:
            console.print_json(found.as_dict())
        else:
            print_comparison(found)
        return
    page = qexport.render(folder, plots, study)
    if as_json:
        console.print_json(rendered_summary(page))
    else:
        print_rendered(page)


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Sample instead of taking the likeliest token; 0 does not.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that add up to p.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template of the model.")] = False,
    threads: Threads = None,
    provider: Provider = None,
) -> None:
    """Continue a prompt with ONNX Runtime, printing while it grows."""
    from . import console

    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    sampling = qexport.Sampling(**given) if given and temperature != 0 else None
    console.quiet_libraries()
    _imported()
    qexport.generate(
        folder, prompt, max_new_tokens=max_new_tokens, sampling=sampling, chat=chat, threads=threads, provider=provider,
        on_text=lambda row, piece: print(piece, end="", flush=True),
    )  # fmt: skip
    print()


@app.command()
def bench(
    folder: Folder,
    against: Annotated[Path | None, typer.Option(help="Another folder, measured in turns with the first.")] = None,
    prompt_length: Annotated[
        list[int] | None, typer.Option(help="Prompt tokens, several times too; by default 128, 512 and 2048.")
    ] = None,
    past: Annotated[
        list[int] | None, typer.Option(help="Tokens in the cache when decoding; by default 128 and 2048.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of everything; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of ONNX Runtime.")] = 2,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Measure speed, load time, memory and size, alone or against another folder."""
    from . import console
    from .reporting import print_bench

    _imported()
    with console.showing_progress() as progress:
        result = qexport.bench(
            folder, against, prompt_lengths=prompt_length or None, decode_pasts=past or None, repeats=repeats,
            threads=threads, provider=provider, progress=progress,
        )  # fmt: skip
    if as_json:
        console.print_json(result.as_dict())
    else:
        print_bench(result)


@app.command()
def study(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `qexport export` wrote from one model.")],
    reference: Annotated[str, typer.Option(help="The model that was exported: id, folder or GGUF file.")],
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="0 takes the likeliest token; several times too; by default 0, 0.5, 0.8 and 1."),
    ] = None,
    top_k: Annotated[
        list[int] | None, typer.Option(help="Sample from the k likeliest tokens, 0 from all; by default 0 and 50.")
    ] = None,
    max_new_tokens: Annotated[
        list[int] | None, typer.Option(help="Length of texts; a shorter one is the start of the longest; 32 and 128.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of sampling, several times too; 0 and 1.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="UTF-8 file with a prompt a line; by default a few that come with qexport.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write everything to this file as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw curves over temperature into this PNG (matplotlib).")] = None,
    threads: Threads = None,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Let exports and the float model write under many sampling settings, and compare their texts.

    distance: share of draws that differ at least, where both models read the float model's text (total variation).
    same start, same tokens: of the float model's text for the same random numbers, before the first difference and
    at all. perplexity: of the text under the float model; to float's: over that of the float model's own text.
    repeated: 4-grams that were there before. tokens/s: without prompts and drawing; the float model runs in PyTorch.
    """
    from . import console

    console.quiet_libraries()
    from .reporting import print_study
    from .study import check_place, check_plot
    from .study import plot as draw

    _imported()
    given = {"temperatures": temperature, "top_ks": top_k, "max_new_tokens": max_new_tokens, "seeds": seed}
    grid = qexport.Grid(**{name: tuple(values) for name, values in given.items() if values})
    if out is not None:
        check_place(out)
    if plot is not None:
        check_plot(plot)
    with console.showing_progress() as progress:
        result = qexport.study(
            folders, reference, grid=grid, prompts=prompts, threads=threads, provider=provider, progress=progress,
            on_estimate=lambda estimate: print(estimate, file=sys.stderr, flush=True),
        )  # fmt: skip
    if out is not None:
        result.save(out)
    if plot is not None:
        draw(result, plot)
    if as_json:
        console.print_json(result.as_dict())
    else:
        print_study(result)


@app.command()
def optimize(folder: Folder, as_json: Json = False) -> None:
    """Keep the graph that ONNX Runtime makes at every load in FOLDER/optimized: it loads faster, and takes disk."""
    from . import console

    result = qexport.optimize(folder)
    if as_json:
        console.print_json(result.as_dict())
    else:
        from .reporting import print_optimized

        print_optimized(result)


@recipes_app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """Name and purpose of every preset."""
    from . import console

    presets = qexport.Recipe.presets()
    if as_json:
        console.print_json(presets)
    else:
        console.print_table(["preset", "what it is"], [list(row) for row in presets.items()])


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="Preset, scheme, or YAML file.")]) -> None:
    """A recipe with every key written out, as YAML to copy and change."""
    print(qexport.Recipe.load(name).to_yaml(), end="")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look for what keeps models from running on this machine. Exit code 1 when something has to be mended."""
    from dataclasses import asdict

    from . import console
    from .reporting import print_checks

    checks: list[Any] = qexport.diagnose()
    if as_json:
        console.print_json([asdict(check) for check in checks])
    else:
        print_checks(checks)
    if not all(check.ok or check.optional for check in checks):
        raise typer.Exit(1)
