"""A graph on a device: its tensors, and the constants that it makes there."""

from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from ..device import CPU
from .edit import attributes, get_tensor, set_tensor


def move(module: GraphModule, device: torch.device) -> None:
    """Bring every loaded tensor of a graph to a device, and let what it makes of nothing be made there."""
    for name in attributes(module.graph):
        tensor = get_tensor(module, name)
        if tensor.device.type != "meta" and tensor.device != device:
            set_tensor(module, name, tensor.to(device))
    make_on(module, device)


def make_on(module: GraphModule, device: torch.device) -> None:
    """Let a graph make its constants, such as positions, on a device, which operators name in their arguments."""
    changed = False

    def placed(value: Any) -> Any:
        nonlocal changed
        if not isinstance(value, torch.device) or value.type == "meta" or value == device:
            return value
        changed = True
        return device

    for node in module.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, placed), map_aggregate(node.kwargs, placed)
    if changed:
        module.recompile()


def unload(module: GraphModule) -> None:
    """Drop the data of every tensor that a graph reads; shapes and dtypes stay, and the graph is one for the CPU."""
    for name in attributes(module.graph):
        set_tensor(module, name, get_tensor(module, name).to("meta"))
    make_on(module, CPU)
