"""What passes note on nodes: keys of one enumeration, kept when a block is written."""

from helpers.pass_runs import plan_of
from helpers.runners import load_weights
from qexport.calibrate import shards
from qexport.graph.meta import Meta
from qexport.passes.base import Pipeline
from qexport.passes.branches.lorc import LoRC
from qexport.passes.weights.rtn import RoundToNearest


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
