"""What act-order costs a decoding step of a GPTQ checkpoint: the file as it is exported, and two others, in turns.

    python samples/act_order_cost.py CHECKPOINT [--context 64] [--turns 60]

"no order" is the same file with every Gather of an order taken out: it does the same work in no order, and writes
nonsense. "a Gather each" has one also where the export folded the order into the rows of the linears in front. Medians
of the processor time of a step.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, helper, numpy_helper

import qexport
from qexport.artifact import checksums
from qexport.artifact.files import link_or_copy
from qexport.artifact.manifest import Manifest
from qexport.runtime.decoder import open_decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache")
    parser.add_argument("--turns", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qexport-") as place:
        made = qexport.export(given.checkpoint, out_dir=Path(place) / "out")
        changes: dict[str, Callable[[GraphProto, Manifest], int]] = {
            "no order": without_gathers, "as exported": lambda graph, manifest: len(orders(graph)),
            "a Gather each": with_gathers,
        }  # fmt: skip
        folders, gathers = {}, {}
        for name, change in changes.items():
            folders[name] = Path(place) / name
            gathers[name] = changed(made.folder, folders[name], made.manifest, change)
        took = steps(folders, given.context, given.turns)
    least = statistics.median(took["no order"])
    print("| file | Gathers | ms a step | over no order |\n| --- | --- | --- | --- |")
    for name, seconds in took.items():
        median = statistics.median(seconds)
        print(f"| {name} | {gathers[name]} | {1e3 * median:.2f} | {100 * (median / least - 1):+.1f} % |")


def changed(
    folder: Path, into: Path, manifest: Manifest, change: Callable[[GraphProto, Manifest], int]
) -> int:  # fmt: skip
    """A copy of an export with another graph; returns how many orders are left in it."""
    into.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name not in ("model.onnx", checksums.FILE):
            link_or_copy(file, into / file.name)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    count = change(model.graph, manifest)
    (into / "model.onnx").write_bytes(model.SerializeToString())
    return count


def orders(graph: GraphProto) -> list[onnx.NodeProto]:
    return [n for n in graph.node if n.op_type == "Gather" and n.input[1].endswith(".input_order")]


def without_gathers(graph: GraphProto, manifest: Manifest) -> int:
    """Every reader of an order reads what the Gather reads."""
    source = {node.output[0]: node.input[0] for node in orders(graph)}
    for node in graph.node:
        if node.output[0] not in source:
            node.input[:] = [source.get(name, name) for name in node.input]
    for node in orders(graph):
        graph.node.remove(node)
    return 0


def with_gathers(graph: GraphProto, manifest: Manifest) -> int:
    """A Gather in front of every linear whose order is folded; of any order, which costs the same."""
    for entry in (entry for entry in manifest.linears if entry.reads_order is not None):
        name, place = f"{entry.name}.put_back", next(i for i, n in enumerate(graph.node) if n.name == entry.node)
        order = np.random.default_rng(0).permutation(entry.shape[1])
        graph.initializer.append(numpy_helper.from_array(order, f"{name}.input_order"))
        product = graph.node[place]
        product.input[0] = name
        taken = helper.make_node("Gather", [entry.input, f"{name}.input_order"], [name], name, axis=-1)
        graph.node.insert(place, taken)
    return len(orders(graph))


def steps(folders: dict[str, Path], context: int, turns: int) -> dict[str, list[float]]:
    """Processor seconds of one step behind as many tokens, of each folder."""
    decoders = {name: open_decoder(folder, threads=1) for name, folder in folders.items()}
    took: dict[str, list[float]] = {name: [] for name in folders}
    for decoder in decoders.values():
        decoder.run(np.arange(3, 3 + context)[None])
    for turn in range(turns + 3):
        for name, decoder in decoders.items():
            started = time.process_time()
            decoder.run(np.array([[5]]))
            if turn >= 3:
                took[name].append(time.process_time() - started)
    return took


if __name__ == "__main__":
    main()
