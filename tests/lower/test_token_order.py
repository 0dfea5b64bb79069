"""The order of tokens as ONNX nodes: what the operator in the graph says, for every mask of up to six places."""

import itertools
import operator

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch.fx import Graph, GraphModule

from qexport.capture.graph import Port
from qexport.graph.edit import TensorSpec
from qexport.lower.build import build_model
from qexport.lower.lowered_block import LoweredBlock
from qexport.targets.cpu import CpuTarget

ops = torch.ops.qexport
ROWS, ONE = ("batch", "sequence"), ("one",)
RESULTS = {"valid": (torch.bool, ("batch", 1, 1)), "last": (torch.int32, ("batch",)), "total": (torch.int32, ONE)}
RESULTS |= {"turned": (torch.int64, ROWS), "back": (torch.int64, ROWS)}


def order_session(tmp_path):
    graph = Graph()
    mask, ids = graph.placeholder("mask"), graph.placeholder("ids")
    mask.meta, ids.meta = {"spec": TensorSpec(torch.int64, ("batch", "total"))}, {"spec": TensorSpec(torch.int64, ROWS)}
    found = graph.call_function(ops.real_first.default, (mask, ids))
    specs = (ids.meta["spec"], ids.meta["spec"], *(TensorSpec(*RESULTS[name]) for name in ("valid", "last", "total")))
    found.meta = {"spec": specs}
    forward, backward, *rest = (graph.call_function(operator.getitem, (found, i)) for i in range(5))
    turned = graph.call_function(ops.take_tokens.default, (ids, forward))
    back = graph.call_function(ops.take_tokens.default, (turned, backward))
    for node, spec in zip((forward, backward, *rest, turned, back), (*specs, *specs[:2]), strict=True):
        node.meta = {"spec": spec}
    graph.output((*rest, turned, back))
    module = GraphModule(torch.nn.Module(), graph)
    inputs = [Port(n, n, torch.int64, node.meta["spec"].shape) for n, node in (("mask", mask), ("ids", ids))]
    outputs = [Port(name, name, *kind) for name, kind in RESULTS.items()]
    piece = LoweredBlock("order", module, ["mask", "ids"], list(RESULTS), lambda name: None)
    ir.save(build_model([piece], inputs, outputs, CpuTarget(), "0").model, tmp_path / "order.onnx")
    return ort.InferenceSession(tmp_path / "order.onnx")


def test_every_mask_of_up_to_six_tokens(tmp_path):
    session = order_session(tmp_path)
    for total in range(1, 7):
        mask = torch.tensor(list(itertools.product([0, 1], repeat=total)))
        for new in range(1, total + 1):
            ids = torch.arange(1, new + 1).expand(len(mask), new).contiguous()
            forward, backward, *wanted = ops.real_first(mask, ids)
            turned = ops.take_tokens(ids, forward)
            wanted += [turned, ops.take_tokens(turned, backward)]
            got = session.run(list(RESULTS), {"mask": mask.numpy(), "ids": ids.numpy()})
            for name, ours, theirs in zip(RESULTS, wanted, got, strict=True):
                assert torch.equal(ours, torch.from_numpy(theirs)), (name, total, new)
