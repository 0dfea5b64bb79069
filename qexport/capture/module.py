"""Capturing any nn.Module with example inputs."""

import torch

from .. import ops  # noqa: F401  registers the operators
from ..errors import CaptureError, InputError
from ..passes.edit import get_tensor
from .blocks import cut
from .graph import Captured, Port
from .normalize import normalize
from .trace import root_cause
from .weights import StateDict


def capture_module(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> Captured:
    """Capture a module that maps tensors to a tensor or a tuple of tensors.

    The first dimension of every input is the batch and dynamic; the others are as in the example.

    Args:
        model: in evaluation mode while it is traced; its parameters stay where they are.
        example_inputs: the tensors of one forward call, batch at least 2.

    Raises:
        InputError: an input is no tensor.
        CaptureError: torch.export cannot follow the model.
    """
    for index, tensor in enumerate(example_inputs):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
            raise InputError(f"input {index} is not a tensor with a batch dimension", place="example_inputs")
    batched = tuple(t if t.shape[0] > 1 else torch.cat([t, t]) for t in example_inputs)
    training = model.training
    try:
        with torch.no_grad():
            shapes = tuple({0: torch.export.Dim.AUTO} for _ in batched)
            exported = torch.export.export(model.eval(), batched, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises almost anything, and hides the reason behind other errors
        raise CaptureError(
            f"torch.export failed: {root_cause(error)}", place=type(model).__name__,
            remedy="Control flow that depends on values of tensors has to be rewritten",
        ) from error  # fmt: skip
    finally:
        model.train(training)
    whole = exported.module(check_guards=False)
    for node in whole.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["module_path"] = next(reversed(stack.values()))[0] if stack else ""
    normalize(whole)
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers()}
    used = {n.target for n in whole.graph.nodes if n.op == "get_attr"}
    inputs = [_port(n.name, n) for n in whole.graph.nodes if n.op == "placeholder"]
    results = whole.graph.output_node().args[0]
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    outputs = [_port("output" if len(results) == 1 else f"output_{i}", n) for i, n in enumerate(results)]
    return Captured(
        kind="module",
        blocks=cut(whole, [port.value for port in outputs]),
        inputs=inputs,
        outputs=outputs,
        weights=StateDict(model),
        constants={n: get_tensor(whole, n).detach() for n in used - parameters},
    )


def _port(name: str, node: torch.fx.Node) -> Port:
    value = node.meta["val"]
    return Port(name, node.name, value.dtype, tuple("batch" if i == 0 else int(d) for i, d in enumerate(value.shape)))
