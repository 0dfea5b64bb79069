"""The weights of the states of recurrent layers as codes, in groups, for a product in every step.

    h_t = step(W x_t + b, U h_(t-1) + c): W is a linear over all steps at once, and rounded as any other; here U is.

It follows W: where W is codes in groups, U is the same, else 8 bits in groups of 128 (`w8a16_g128`), and the kernel
rounds h_(t-1) to 8 bits in these groups, every row of a batch and every step by itself. An LSTM in `w8a8_static` has
one scale for each row of U, and h_(t-1) on a fixed grid of [-1, 1]. So a sequence depends neither on what comes after
it nor on what stands beside it, as it would in ONNX Runtime's DynamicQuantizeLSTM with its one range over all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from ..graph.edit import finish, get_tensor
from ..graph.meta import Meta
from ..graph.narrow import widened
from ..graph.views import RecurrentSteps, tensor_name
from ..plan.linear_plan import LinearPlan
from ..plan.recurrent_plan import state_format, whole_operator
from ..quant.packing import stored_block
from .base import Context, GraphPass, PassResult, SiteRecord
from .formats.integer import weight_tensors

ops = torch.ops.qexport


@dataclass(frozen=True)
class QuantizeStates(GraphPass):
    """Round the weight of the states of every layer whose input's weight is rounded.

    Attributes:
        plan: by linear name.
    """

    plan: Mapping[str, LinearPlan]
    preserves_values: ClassVar[bool] = True

    def applies_to(self, module: GraphModule) -> bool:
        return bool(self._sites(module))

    def call(self, module: GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for name, node in self._sites(module).items():
            steps, scheme = RecurrentSteps.of(node), self.plan[name].chosen
            fmt, whole = state_format(scheme, steps.kind), whole_operator(scheme, steps.kind)
            weight = fmt.round_to_nearest(widened(get_tensor(module, tensor_name(steps.weight))))
            with module.graph.inserting_before(node):
                codes = weight_tensors(module, f"{name}.state", weight)
            node.target = ops.lstm_steps_int8.default if whole else ops.recurrent_steps_nbits.default
            given = (steps.bias, steps.lengths, steps.reverse, steps.kind)
            node.args = (steps.gates, steps.hidden, steps.cell, *(codes[:2] if whole else codes), *given)
            if not whole:
                block = stored_block(fmt.stored_bits, fmt.group_size)
                node.args = (*node.args, fmt.stored_bits, fmt.group_size, block, False)
            result.changed.append(SiteRecord(name, f"weight of the states in {fmt.stored_bits} bits"))
        finish(module)
        return result

    def _sites(self, module: GraphModule) -> dict[str, Node]:
        found = {node.meta[Meta.GATES]: node for node in module.graph.nodes if Meta.GATES in node.meta}
        return {
            name: node
            for name, node in found.items()
            if RecurrentSteps.match(node) and name in self.plan and self.plan[name].scheme is not None
        }
