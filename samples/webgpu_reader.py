"""ONNX Runtime's WebGPU provider, asked: which operators it has, and what it computes of exports, without a GPU.

    pip install --no-deps --target webgpu onnxruntime-webgpu
    export VK_ICD_FILENAMES=/usr/lib/chromium/vk_swiftshader_icd.json LD_LIBRARY_PATH=/usr/lib/chromium
    python samples/webgpu_reader.py webgpu --table operators.json
    python samples/webgpu_reader.py webgpu out other_export

SwiftShader, which comes with Chromium, is a Vulkan driver in software. The table has every operator of ONNX, in models
of one node from onnx.backend.test, at opsets 18 to 24, in a few types besides: those of the first input with which such
a model loads without the CPU provider. Of exports it prints how many nodes are where, and how far the logits of a short
prompt are from the CPU provider's; `qexport inspect out --runs-on webgpu` tells the former from the table.
"""

import argparse
import collections
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

OPSETS = (18, 20, 21, 22, 23, 24)
OTHER_TYPES = {
    TensorProto.FLOAT: (TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64),
    TensorProto.UINT8: (TensorProto.INT8,),
}  # fmt: skip
WEBGPU, CPU = "WebGpuExecutionProvider", "CPUExecutionProvider"


def variants(model: onnx.ModelProto):
    """A model of one node at every opset, what is float32 in it in other types too; and the version of its operator."""
    node, kind = model.graph.node[0], model.graph.input[0].type.tensor_type.elem_type
    for opset in OPSETS:
        try:
            since = onnx.defs.get_schema(node.op_type, opset, "").since_version
        except onnx.defs.SchemaError:
            continue
        for other in (kind, *OTHER_TYPES.get(kind, ())):
            made = onnx.ModelProto()
            made.CopyFrom(model)
            made.ir_version = 10
            del made.opset_import[:]
            made.opset_import.append(onnx.helper.make_opsetid("", opset))
            for value in (*made.graph.input, *made.graph.output):
                if value.type.tensor_type.elem_type == kind:
                    value.type.tensor_type.elem_type = other
            yield made, since, TensorProto.DataType.Name(other)


def compiling(compile_model: Callable[[bytes], object]) -> dict[str, dict[int, list[str]]]:
    """By operator and version the types of the first input with which the ONNX tests of one node can be compiled."""
    from onnx.backend.test.case.node import collect_testcases

    found = collections.defaultdict(lambda: collections.defaultdict(set))
    for case in collect_testcases(None):
        model = case.model
        alone = model is not None and len(model.graph.node) == 1 and not model.functions and model.graph.input
        if not alone or model.graph.node[0].domain or not model.graph.input[0].type.tensor_type.elem_type:
            continue
        name = model.graph.node[0].op_type
        for made, since, kind in variants(model):
            if kind in found[name][since]:
                continue
            try:
                compile_model(made.SerializeToString())
            except Exception:  # noqa: S112 - it is not there, or the model is none
                continue
            found[name][since].add(kind)
    kept = {name: {s: sorted(kinds) for s, kinds in of.items() if kinds} for name, of in sorted(found.items())}
    return {name: of for name, of in kept.items() if of}


def table(ort) -> dict[str, dict[int, list[str]]]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return compiling(lambda model: ort.InferenceSession(model, options, providers=[WEBGPU]))


def session_of(ort, folder: Path, provider: str, severity: int = 3):
    options = ort.SessionOptions()
    options.log_severity_level = severity
    for key, value in json.loads((folder / "manifest.json").read_text())["session"].items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(folder / "model.onnx", options, providers=[provider])


def logits(session) -> np.ndarray:
    ids = np.array([[5, 6, 7, 8, 9, 3, 4, 2]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros([1, value.shape[1], 0, value.shape[3]], np.float32)
    return session.run(["logits"], {value.name: feeds[value.name] for value in session.get_inputs()})[0]


def placement(packages: Path, folder: Path) -> dict[str, int]:
    """How many nodes are where; the log says it, which goes past Python."""
    code = (
        f"import sys; sys.path[:0] = [{str(packages)!r}, {str(Path(__file__).parent)!r}]; import onnxruntime as ort; "
        f"from pathlib import Path; import webgpu_reader as w; w.session_of(ort, Path({str(folder)!r}), w.WEBGPU, 0)"
    )
    log = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace").stderr
    found = re.findall(r"placed on \[(\w+)\]\. Number of nodes: (\d+)", log)
    return {provider.removesuffix("ExecutionProvider"): int(count) for provider, count in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="where onnxruntime-webgpu lies")
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--table", type=Path, help="write the operators here")
    given = parser.parse_args()
    sys.path.insert(0, str(given.packages))
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    if given.table:
        given.table.write_text(json.dumps(table(ort), indent=1))
    for folder in given.folders:
        ours, theirs = (logits(session_of(ort, folder, provider)) for provider in (CPU, WEBGPU))
        line = {
            "folder": str(folder), "placed": placement(given.packages, folder),
            "largest_difference": float(np.abs(ours - theirs).max()), "largest": float(np.abs(ours).max()),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
