"""A quantized block as a target wants it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule


@dataclass(frozen=True)
class LoweredBlock:
    """A block ready to be written, its graph already rewritten for the target.

    Attributes:
        read: the tensor of a get_attr node, called only while the file is written.
        prompt: the same block as it is for prompts, where it is another one for them.
        apart: linears that could have been merged with others and were not, and why.
        dense: mixtures of experts, by the path of their module, that compute every expert for every token, and why.
    """

    name: str
    module: GraphModule
    inputs: Sequence[str]
    outputs: Sequence[str]
    read: Callable[[str], torch.Tensor]
    prompt: "LoweredBlock | None" = None
    apart: Mapping[str, str] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
