"""What becomes of recurrent layers, decided from shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from ..graph.meta import Meta
from ..graph.sites import Linear
from ..graph.views import RecurrentSteps, size_at, sizes_of, tensor_name
from ..quant.formats import IntegerFormat, Scheme

_STATE = IntegerFormat(8, 128)


def whole_operator(scheme: Scheme, kind: str) -> bool:
    """Whether a layer is one operator with its input's product: an LSTM in 8 bits with a static range of its input."""
    activation = scheme.activation
    static = activation is not None and activation.kind == "static" and activation.bits == 8 and not activation.e4m3
    return kind == "lstm" and static and scheme.weight == IntegerFormat(8)


def state_format(scheme: Scheme, kind: str) -> IntegerFormat:
    """The format of the weight of the states, where the input's has this scheme."""
    weight = scheme.weight
    if isinstance(weight, IntegerFormat) and whole_operator(scheme, kind):
        return weight
    if type(weight) is IntegerFormat and scheme.activation is None and weight.group_size > 0:
        return weight
    return _STATE


def steps_behind(linear: Linear) -> Node | None:
    """The steps of the recurrent layer whose input a linear multiplies; None of any other."""
    return next((user for user in linear.node.users if user.meta.get(Meta.GATES) == linear.name), None)


@dataclass(frozen=True)
class StateWeight:
    """The weight of the states of a recurrent layer, which is rounded with that of its input.

    Attributes:
        name: of the tensor; shape: [gates * states, states]; kind: of the layer, as `recurrent_steps` has it.
    """

    name: str
    shape: tuple[int, int]
    kind: str

    def bytes(self, scheme: Scheme, float_bytes: int) -> int:
        """Bytes in the file, where the input's weight has this scheme."""
        return state_format(scheme, self.kind).bytes(self.shape, float_bytes)


def state_weight(linear: Linear) -> StateWeight | None:
    """The weight of the states of the recurrent layer whose input a linear is; None of any other."""
    if (node := steps_behind(linear)) is None:
        return None
    steps = RecurrentSteps.of(node)
    rows, states = sizes_of(steps.weight)
    return StateWeight(tensor_name(steps.weight), (rows, states), steps.kind)


def float_steps(least_states: int | None) -> Callable[[Linear, Scheme], str]:
    """Why a linear stays float that is the input of a recurrent layer; empty where it need not, and of any other.

    Args:
        least_states: the fewest states whose steps run faster with codes than in float; None: the target has no kernel.
    """

    def why(linear: Linear, scheme: Scheme) -> str:
        node = steps_behind(linear)
        if node is None:
            return ""
        if least_states is None:
            return "recurrent layers are float on this target"
        steps = RecurrentSteps.of(node)
        if steps.weight.op != "get_attr":
            return "the weight of the states is not a constant"
        same = [user for user in steps.weight.users if RecurrentSteps.match(user)]
        if len(same) > 1 or len(linear.node.users) > 1:
            return f"{tensor_name(steps.weight)} is used several times"
        states = size_at(steps.hidden, 1)
        if states < least_states and not whole_operator(scheme, steps.kind):
            better = ", and w8a8_static is faster" if steps.kind == "lstm" else ""
            return f"steps of less than {least_states} states are faster in float{better}"
        return ""

    return why
