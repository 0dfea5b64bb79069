"""The application, and how a command declares itself.

A command is one module in `commands`:

    @command(RUN)
    def bench(folder: Folder, as_json: Json = False) -> None:
        \"\"\"What its line in `qexport --help` says.\"\"\"

It is found by its place. Every command takes --verbose and --quiet without naming them.
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import Parameter, signature
from pkgutil import iter_modules
from typing import Annotated, Any, TypeVar

import typer

from ..log import configure
from . import commands

# Under which heading of `qexport --help` a command stands, in their order there.
MAKE, COMPARE, RUN = PANELS = "Make exports", "Compare them with their models", "Run them"
_Function = TypeVar("_Function", bound=Callable[..., None])

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize PyTorch models and run them in ONNX Runtime.",
)


# What every command has besides its own options.
_VERBOSITY = {
    "verbose": Annotated[
        int,
        typer.Option(
            "--verbose", "-v", count=True, help="Say on stderr what is decided and why; -vv: all details.",
            show_default=False, metavar="",
        ),
    ],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but errors.")],
}  # fmt: skip


def _with_verbosity(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the options that say how much is logged, which it need not know."""

    @wraps(function)
    def run(*, verbose: int, quiet: bool, **given: Any) -> None:
        configure(-1 if quiet else verbose)
        function(**given)

    own = signature(function)
    more = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=_VERBOSITY[name])
        for name, default in (("verbose", 0), ("quiet", False))
    ]
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # type: ignore[attr-defined]
    run.__annotations__ = function.__annotations__ | _VERBOSITY
    return run


def command(panel: str) -> Callable[[_Function], _Function]:
    """Register a function as the command of its name.

    Args:
        panel: one of PANELS.
    """
    return _registering(app.command(rich_help_panel=panel))


def group(name: str, panel: str, what: str) -> Callable[[str], Callable[[_Function], _Function]]:
    """Make a command that has commands below it; returns what registers one of those by its name.

    Args:
        panel: one of PANELS; what: its line in the help.
    """
    below = typer.Typer(no_args_is_help=True, help=what)
    app.add_typer(below, name=name, rich_help_panel=panel)
    return lambda name: _registering(below.command(name))


def _registering(register: Callable[[Callable[..., None]], object]) -> Callable[[_Function], _Function]:
    """Register a function with the options of all commands, and leave it as it is for its module."""

    def decorate(function: _Function) -> _Function:
        register(_with_verbosity(function))
        return function

    return decorate


def load_commands() -> None:
    """Import every command there is, and put them in the order of their headings."""
    for module in iter_modules(commands.__path__):
        import_module(f"{commands.__name__}.{module.name}")
    app.registered_commands.sort(key=lambda found: PANELS.index(str(found.rich_help_panel)))
