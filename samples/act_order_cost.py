"""What act-order costs: the share of the Gathers that put inputs into the order of codes, in the time of all kernels.

    python samples/act_order_cost.py EXPORT [--prompt 128]

EXPORT is what `qexport export` made of a checkpoint with act-order. "a Gather each" is the same file with one also
where the export folded the order into the rows of the linears in front. Times are ONNX Runtime's own, medians.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import GraphProto, NodeProto, helper, numpy_helper

from qexport.artifact import checksums
from qexport.artifact import manifest as manifests
from qexport.artifact.files import link_or_copy
from qexport.artifact.manifest import Manifest
from qexport.validation.timing import measure

ORDER = ".input_order"  # behind the name of a linear, in that of the tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    given = parser.parse_args()
    manifest = manifests.load(given.export)
    print("| file | Gathers | of a step | of a prompt |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory(prefix="qexport-") as place:
        for name, folder in (("as exported", given.export), ("a Gather each", Path(place))):
            if folder != given.export:
                put_back(given.export, folder, manifest)
            nodes = [node.name for node in orders(onnx.load(folder / "model.onnx", load_external_data=False).graph)]
            times = measure(folder, manifest, prompt=torch.arange(3, 3 + given.prompt), threads=1)
            shares = [sum(found.get(node, 0.0) for node in nodes) for found in (times.step_nodes, times.nodes)]
            print(f"| {name} | {len(nodes)} | {shares[0]:.1%} | {shares[1]:.1%} |", flush=True)


def orders(graph: GraphProto) -> list[NodeProto]:
    return [node for node in graph.node if node.op_type == "Gather" and node.input[1].endswith(ORDER)]


def put_back(folder: Path, into: Path, manifest: Manifest) -> None:
    """A copy with a Gather in front of every linear whose order is folded: of the order that its input has already."""
    for file in folder.iterdir():
        if file.is_file() and file.name not in ("model.onnx", checksums.FILE):
            link_or_copy(file, into / file.name)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes, folded = [], {entry.node: entry for entry in manifest.linears if entry.reads_order is not None}
    for node in model.graph.node:
        if entry := folded.get(node.name):
            name = f"{entry.name}.put_back"
            model.graph.initializer.append(numpy_helper.from_array(np.arange(entry.shape[1]), f"{name}{ORDER}"))
            nodes.append(helper.make_node("Gather", [node.input[0], f"{name}{ORDER}"], [name], name, axis=-1))
            node.input[0] = name
        nodes.append(NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (into / "model.onnx").write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
