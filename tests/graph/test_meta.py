"""What passes note on nodes: keys of one enumeration, kept when a block is written."""

import ast
from pathlib import Path

import qexport
from helpers.pass_runs import plan_of
from helpers.runners import load_weights
from qexport.calibrate import shards
from qexport.graph.meta import Meta
from qexport.passes import base
from qexport.passes.base import Pipeline
from qexport.passes.branches.lorc import LoRC
from qexport.passes.weights.rtn import RoundToNearest

TRACED = {"val", "nn_module_stack", "stack_trace"}  # of torch.export, on nodes that are not in blocks yet


def test_what_passes_note_is_there_after_a_block_was_written(captured, tmp_path):
    model = load_weights(captured("llama"))
    block, plan = model.blocks[1], plan_of(model, "w4a16_g32")
    Pipeline([RoundToNearest(plan), LoRC(plan, 4, int8=True)]).run(block.module, lambda module, wanted: {}, [], [])
    shards.save_block(tmp_path / "block", block, {}, "run")
    back, _ = shards.load_block(tmp_path / "block", "run")

    nodes = list(block.module.graph.nodes)
    noted = {key for node in nodes for key in node.meta}
    assert noted >= {Meta.LINEAR, Meta.RESULT_OF, Meta.BRANCH_OF, Meta.MODULE_PATH}
    for node, again in zip(nodes, back.module.graph.nodes, strict=True):
        assert again.meta == node.meta and set(node.meta) <= set(Meta)


def test_no_key_is_spelled_out_beside_the_enumeration():
    found = {}
    for folder in (Path(qexport.__file__).parent, Path(base.__file__).parent):
        for path in folder.rglob("*.py"):
            found |= {f"{path.name}:{line}": key for line, key in _keys(ast.parse(path.read_text(encoding="utf-8")))}
    assert {place: key for place, key in found.items() if key not in TRACED} == {}


def _keys(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, key) of every `.meta["key"]` and `.meta.method("key")`."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="meta"), slice=ast.Constant(value=str() as key)):
                found.append((node.lineno, key))
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="meta")), args=[ast.Constant(value=key), *_]):
                found.append((node.lineno, key))
    return found
