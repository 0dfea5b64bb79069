"""Which operators become ONNX, as a table: core ATen, and modules of one linear and one operator beside it.

    python samples/operators.py [--out docs/operators.md]

Every operator of core ATen is looked up, and its calls in `tests/helpers/operators.py` are what the tests run. The
modules are exported here, run in ONNX Runtime on two batches and compared with PyTorch: about two minutes.
"""

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import exports, operator_modules, operators  # noqa: E402
from qexport.api.stages.capturing import capture_model  # noqa: E402
from qexport.capture.decompose import has_rule  # noqa: E402
from qexport.errors import QExportError  # noqa: E402
from qexport.lower.registry import is_translated, reason_of  # noqa: E402
from qexport.recipe.recipe import Recipe  # noqa: E402

FLOAT = Recipe(scheme="w4a16_g32", overrides=[{"match": "*", "scheme": "float"}])
HEAD = """# Operators

Made by `python samples/operators.py`.

A model is captured by `torch.export`. Operators that have a translation of their own keep their form; where a model
has one without, PyTorch's rules decompose it until what is left has. What cannot be exported is named before a weight
is read, all of it at once, with the line of the model's code.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "operators.md")
    args = parser.parse_args()
    args.out.write_text("\n".join([HEAD, *_core(), "", *_modules(), ""]))


def _core() -> list[str]:
    rows = {str(o).removeprefix("aten."): _form(o) for o in operators.core_operators()}
    kinds = Counter(kind for kind, _ in rows.values())
    counted = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    listed = {kind: [name for name, (of, _) in rows.items() if of == kind] for kind in kinds}
    lines = ["## Core ATen", "", f"{len(rows)} operators: {counted}.", ""]
    for kind in kinds:
        if kind != "refused":
            names = ", ".join(f"`{name}`" for name in listed[kind])
            lines += [f"**{kind.capitalize()}**: {names}.", ""]
    refused = {name: why for name, (of, why) in rows.items() if of == "refused"}
    return [
        *lines,
        "| refused | because |",
        "| --- | --- |",
        *(f"| `{name}` | {why} |" for name, why in refused.items()),
    ]


def _form(operator: torch._ops.OpOverload) -> tuple[str, str]:
    if reason := reason_of(operator):
        return "refused", reason
    if is_translated(operator):
        return "translated", ""
    return ("decomposed", "") if has_rule(operator) else ("dropped, as they compute nothing", "")


def _modules() -> list[str]:
    found = {name: _tried(name) for name in operator_modules.CASES}
    good = sum(not problem for problem in found.values())
    lines = ["## Modules of one linear and one operator", ""]
    lines += [f"{good} of {len(found)} give in ONNX Runtime what they give in PyTorch, on two batches.", ""]
    names = ", ".join(f"`{name}`" for name, problem in found.items() if not problem)
    rows = [f"| `{name}` | {problem.replace('|', '/')} |" for name, problem in found.items() if problem]
    return [*lines, f"They are {names}.", "", "| not exported | because |", "| --- | --- |", *rows]


def _tried(name: str) -> str:
    """What is wrong with a module of the list; nothing where its file computes what it computes."""
    model, x = operator_modules.make(name)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = exports.export(capture_model(model, (x,)), FLOAT, "cpu", Path(folder) / "out").in_onnxruntime()
        except QExportError as error:
            return error.message.split(" at /")[0]
        for fed in (x, torch.cat([x, x.flip(0), x[:1]])):
            with torch.no_grad():
                made = model(fed)
            want = (
                {"output": made} if isinstance(made, torch.Tensor) else {f"output_{i}": m for i, m in enumerate(made)}
            )
            got = run({"x": fed})
            if wrong := [output for output, value in want.items() if not operators.same(got[output], value)]:
                return f"{wrong[0]} differs for a batch of {len(fed)}"
    return ""


if __name__ == "__main__":
    main()
