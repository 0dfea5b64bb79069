"""Where ONNX Runtime's CUDA provider puts the nodes of a model, asked of stand-in CUDA libraries.

It proves placement, not numerics and not speed: nothing is computed. Run as a script this file opens a session for
each line that it reads, and prints what it saw; `placement` asks such a process, as LD_LIBRARY_PATH is read when a
process starts. One process answers many times, as its imports take longest; one that dies is followed by another.
"""

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np
import onnx
import onnxruntime

_TIMEOUT = 600  # seconds; a small model takes less than one, a hanging session must not take the night


_LAUNCHES = "STAND_IN_LAUNCHES"  # see stand_in.c


class Placement(TypedDict):
    nodes: dict[str, dict[str, int]]  # provider: op type: how many, after every fusion, cast and copy
    optimized_ops: dict[str, int]  # op type: how many, in the graph the session runs
    memcpy: int  # copies between host and device in it
    producers: dict[str, str]  # value: op type of the node that makes it, in the same graph
    launches: list[str]  # mangled names of the CUDA kernels that the one run launched, in order


class PlacementError(Exception):
    """The session did not start on the CUDA provider, or a kernel refused its inputs; the message is ONNX Runtime's."""


def placement(
    model_path: Path, session_entries: dict[str, str], env: dict[str, str], dims: dict[str, int] | None = None
) -> Placement:
    """Opens a model on CUDAExecutionProvider, with the CPU behind it, and reports what runs where.

    Args:
        model_path: an ONNX file; its external data lies beside it.
        session_entries: session configuration. {"session.disable_cpu_ep_fallback": "1"} makes a node on the CPU an
            error; "optimization.disable_specified_optimizers" takes names separated by ";".
        env: what `build_stand_ins` returned.
        dims: sizes of the inputs' symbolic dimensions. With them the session also runs once, on zeros: the outputs
            mean nothing, but a kernel that does not take such inputs says so only then.

    Raises:
        PlacementError: the session does not start, or not on CUDA, or does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        log, launches = Path(folder) / "log", Path(folder) / "launches"
        asked = {"model": str(model_path), "entries": session_entries, "dims": dims}
        answer = _asked(env, asked | {"log": str(log), "launches": str(launches)})
        said = log.read_text(errors="replace")
    # The session's verbose log stands around every complaint.
    complaints = "\n".join([line for line in said.splitlines() if not re.search(r"\[[VI]:", line)][-20:])
    seen = json.loads(answer or "null")
    if seen is None:
        raise PlacementError(complaints or "the probe ended")
    ops, providers = seen["ops"], seen["providers"]
    if "CUDAExecutionProvider" not in providers:
        raise PlacementError(f"the session runs on {providers}:\n{complaints}")
    nodes = _placed(said, Counter(ops))
    # Nodes of a body of a loop are in that list too, where not all of them are on one provider with the others.
    if sum(nodes.values(), Counter()) not in (Counter(ops), Counter(ops) + Counter(seen["inner"])):
        raise PlacementError(f"the session's log places {nodes} and the graph it runs has {ops}")
    copies = sum(number for op, number in ops.items() if op.startswith("Memcpy"))
    return Placement(nodes={provider: dict(of) for provider, of in nodes.items()}, optimized_ops=ops, memcpy=copies,
                     producers=seen["producers"], launches=seen["launches"])  # fmt: skip


_PROCESSES: dict[frozenset[tuple[str, str]], subprocess.Popen[str]] = {}  # by their environment


def _asked(env: dict[str, str], asked: dict) -> str:
    """The answer of a process in this environment; empty where it died of the question, or took too long."""
    key = frozenset(env.items())
    if key not in _PROCESSES or _PROCESSES[key].poll() is not None:
        command = [sys.executable, __file__]
        _PROCESSES[key] = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = _PROCESSES[key]
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()
    if not select.select([process.stdout], [], [], _TIMEOUT)[0]:
        process.kill()
    answer = process.stdout.readline()
    if not answer:
        process.wait()  # so that the next question finds it gone
    return answer


def _placed(log: str, ops: Counter) -> dict[str, Counter]:
    """Reads the list of placements that a session logs once it has inserted its copies.

    The session's own record of assignments is made earlier: fused nodes, inserted casts and copies are not in it.
    """
    everything = re.search(r"All nodes placed on \[(\w+)\]", log)
    if everything:
        return {everything[1]: ops}
    nodes: dict[str, Counter] = {}
    provider = None
    for line in log.splitlines():
        if heading := re.search(r"Node\(s\) placed on \[(\w+)\]", line):
            provider = heading[1]
            nodes[provider] = Counter()
        elif provider and (node := re.search(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(", line)):
            nodes[provider][node[1]] += 1
    return nodes


def _inner(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of all graphs inside of nodes."""
    for body in (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        yield from body.node
        yield from _inner(body)


def _open(model: str, entries: dict[str, str], dims: dict[str, int] | None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 0  # placements are logged at this level only
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        # Weights stay out of the file that is read back, and a protobuf holds 2 GB at most.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        # The session puts the CPU behind it by itself; naming it would contradict session.disable_cpu_ep_fallback.
        session = onnxruntime.InferenceSession(model, options, ["CUDAExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        launches = Path(os.environ[_LAUNCHES])
        launches.write_text("")  # not those that found out at load which kernel is fastest
        if dims is not None:
            feeds = {value.name: _zeros(value.type.tensor_type, dims) for value in graph.input}
            session.run_with_ort_values(None, feeds)
    return {
        "ops": Counter(node.op_type for node in graph.node),
        "inner": Counter(node.op_type for node in _inner(graph)),
        "producers": {value: node.op_type for node in graph.node for value in node.output if value},
        "providers": session.get_providers(),
        "launches": [line for line in launches.read_text().splitlines() if not line.startswith("#")],
    }


def _zeros(type_: onnx.TypeProto.Tensor, dims: dict[str, int]) -> onnxruntime.OrtValue:
    shape = [dims[dim.dim_param] if dim.dim_param else dim.dim_value for dim in type_.shape.dim]
    absent = {onnx.TensorProto.BFLOAT16: np.uint16, onnx.TensorProto.FLOAT8E4M3FN: np.uint8}  # in numpy
    kind = absent.get(type_.elem_type) or onnx.helper.tensor_dtype_to_np_dtype(type_.elem_type)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, kind), type_.elem_type)


def _answer(asked: dict) -> None:
    """Open one session, its log and all complaints in the file that is named."""
    os.environ[_LAUNCHES] = asked.pop("launches")
    log = os.open(asked.pop("log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    os.close(log)
    try:
        found = _open(**asked)
    except Exception:
        traceback.print_exc()
        found = None
    sys.stderr.flush()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        _answer(json.loads(line))
