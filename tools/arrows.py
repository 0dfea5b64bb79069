"""Which room imports which, and whether every arrow points down.

    python tools/arrows.py            the rooms in order, what each imports, and arrows that point up
    python tools/arrows.py --files    the same with the files behind every arrow

`passes/` lies beside the package and is imported as `qexport.passes`, so tools that look for modules below the package
alone do not see it: this one reads both folders. Imports for type checkers alone (`if TYPE_CHECKING`) do not count;
those inside of functions do.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up; a room may import rooms of lines before its own, and itself.
ROOMS = (
    ("errors", "gc_pause", "log", "progress"),
    ("device", "ranks", "formatting", "plugins", "stopping"),
    ("artifact",),
    ("quant",),
    ("graph",),
    ("recipe",),
    ("models",),
    ("capture",),
    ("plan",),
    ("cost",),
    ("passes",),
    ("calibrate",),
    ("lower",),
    ("targets",),
    ("runtime",),
    ("validation",),
    ("mixed_precision", "sampling_study"),
    ("report",),
    ("api",),
    ("qexport",),  # the public names, loaded when they are first used
    ("cli",),
    ("__main__",),
)
# Rooms that the runtime, which deploys alone, may not import though they lie below it.
NARROW = {"runtime": {"errors", "gc_pause", "log", "formatting", "progress", "stopping", "artifact"}}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder, prefix in ((ROOT / "qexport", ("qexport",)), (ROOT / "passes", ("qexport", "passes"))):
        for path in sorted(folder.rglob("*.py")):
            parts = prefix + path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """The room of a module: the part of its name below the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, wherever it does so."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {id(n) for found in ast.walk(tree) if _for_types_alone(found) for n in ast.walk(found)}
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if room(name.name) and name.name.split(".")[0] == "qexport"}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            if source.split(".")[0] == "qexport":
                found |= {f"{source}.{n.name}" if f"{source}.{n.name}" in known else source for n in node.names}
    return found


def arrows() -> dict[tuple[str, str], list[str]]:
    """Every arrow between two rooms, with the imports that make it."""
    known, found = modules(), defaultdict(list)
    for module, path in known.items():
        for other in sorted(imports(module, path, known)):
            if room(other) != room(module):
                found[room(module), room(other)].append(f"{module} -> {other}")
    return dict(found)


def upward(found: dict[tuple[str, str], list[str]]) -> dict[tuple[str, str], list[str]]:
    """The arrows that point up, to a room of the same line, or where a room may not look."""
    rank = {name: line for line, names in enumerate(ROOMS) for name in names}

    def wrong(source: str, target: str) -> bool:
        return rank[target] >= rank[source] or target not in NARROW.get(source, {target})

    return {pair: why for pair, why in found.items() if wrong(*pair)}


def _for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def main() -> int:
    found = arrows()
    for name in (name for line in ROOMS for name in line):
        print(f"{name:16} -> {', '.join(sorted(t for s, t in found if s == name)) or '(nothing)'}")
        for (source, _), why in found.items() if "--files" in sys.argv else ():
            if source == name:
                print(*(f"    {line}" for line in why), sep="\n")
    wrong = upward(found)
    for (source, target), why in wrong.items():
        print(f"points up: {source} -> {target}", *why, sep="\n    ")
    print(f"{len(found)} arrows, {len(wrong)} of them point up")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
