"""Blocks that are there twice, as the branches of an If on the number of new tokens."""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ..artifact.branches import LAYERS, PROMPTS, STEPS
from ..graph.edit import dtype_of
from ..graph.views import results_of
from .emitter import ONNX_DTYPE, Emitter, name_of
from .lowered_block import LoweredBlock
from .prefill_twin import LONGEST_STEP

Add = Callable[[LoweredBlock, dict[str, ir.Value]], None]


def branched(pieces: Sequence[LoweredBlock]) -> tuple[int, int]:
    """[start, stop) of the blocks from the first to the last that is another one for prompts."""
    found = [index for index, piece in enumerate(pieces) if piece.prompt is not None]
    return (found[0], found[-1] + 1) if found else (len(pieces), len(pieces))


def add_branches(
    emit: Emitter, pieces: Sequence[LoweredBlock], known: dict[str, ir.Value], ids: ir.Value, wanted: set[str],
    add: Add, add_for_prompts: Add,
) -> dict[str, ir.Value]:  # fmt: skip
    """Add blocks twice, as the branches of an If on the number of new tokens.

    Args:
        known: values by name; gets those that are read after these blocks.
        ids: input_ids [batch, sequence], or their embeddings [batch, sequence, features].
        wanted: names of values that are read after these blocks.
        add, add_for_prompts: translate a block.

    Returns:
        The values that are made in the branch for steps, by name.
    """
    dtypes = {
        name: ONNX_DTYPE[dtype_of(result)]
        for piece in pieces
        for name, result in zip(piece.outputs, results_of(piece.module.graph), strict=True)
    }
    sides = []
    for prefix in (PROMPTS, STEPS):
        values = dict(known)
        with emit.branch(prefix) as nodes:
            for piece in pieces:
                if prefix == PROMPTS:
                    add_for_prompts(piece.prompt or piece, values)
                else:
                    add(piece, values)
            made = {name: value for name, value in values.items() if known.get(name) is not value}
            # A value leaves once: one that has two names is read under both, and one from outside as it is.
            inside = set(nodes)
            leaving = {name: value for name, value in made.items() if name in wanted and value.producer() in inside}
            for name, value in leaving.items():
                value.type = ir.TensorType(dtypes[name])
        sides.append((nodes, leaving, made))
    (prompt_nodes, prompt_leaving, _), (step_nodes, leaving, made) = sides
    names = {value: name for name, value in leaving.items()}  # by value, so that each is there once
    left = _choose(
        emit, ids, (prompt_nodes, [prompt_leaving[name] for name in names.values()]), (step_nodes, list(names))
    )
    outer = dict(zip(names, left, strict=True))
    known |= {name: outer.get(value, value) for name, value in made.items() if name in wanted}
    return made


def branches_of(graph: ir.Graph) -> list[ir.Graph]:
    """The branches of a finished graph, their outputs named after what the If calls them; none in a file without.

    The If may have taken the name of an output of the model for one of its own.
    """
    for node in graph:
        if node.op_type == "If" and node.name == LAYERS:
            branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
            for branch, prefix in zip(branches, (PROMPTS, STEPS), strict=True):
                for inner, outer in zip(branch.outputs, node.outputs, strict=True):
                    inner.name = prefix + name_of(outer)
            return branches
    return []


def _choose(
    emit: Emitter,
    input_ids: ir.Value,
    prompts: tuple[list[ir.Node], list[ir.Value]],
    steps: tuple[list[ir.Node], list[ir.Value]],
) -> list[ir.Value]:
    """Add the If.

    Args:
        input_ids: as `ids` of `add_branches`.
        prompts, steps: nodes of each branch, made within `Emitter.branch`, and the values that leave it.

    Returns:
        The values that leave it, named as those of the branches are without their prefix.
    """
    length = emit.op("Shape", input_ids, start=1, end=2, name=f"{LAYERS}/length")
    long = emit.op("Greater", length, emit.constant([LONGEST_STEP]), name=f"{LAYERS}/is_prompt")
    graphs = [
        ir.Graph([], values, nodes=nodes, name=name.rstrip("/"))
        for name, (nodes, values) in ((PROMPTS, prompts), (STEPS, steps))
    ]
    left = [ir.Value(name=name_of(value).removeprefix(STEPS), type=value.type, shape=value.shape) for value in steps[1]]
    branches = {"then_branch": graphs[0], "else_branch": graphs[1]}
    emit.nodes.append(ir.node("If", [long], branches, outputs=left, name=LAYERS))
    return left
