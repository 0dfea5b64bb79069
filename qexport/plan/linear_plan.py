"""What will happen to every linear, decided from shapes alone before a weight is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Graph, Node

from ..graph.sites import Linear, chooses, linears, module_of_call
from ..models.checkpoint import GivenCodes
from ..quant.formats import ActivationFormat, Scheme
from .recurrent_plan import StateWeight, state_weight


class Planned:
    """What may be quantized.

    Attributes:
        name: its module path; block: the block it is in; shape: of its weight.
        scheme: None keeps it in float; reason: why, where there is something to say.
    """

    name: str
    block: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    reason: str

    @property
    def chosen(self) -> Scheme:
        """The scheme of what is quantized.

        Raises:
            TypeError: it stays in float.
        """
        if self.scheme is None:
            raise TypeError(f"{self.name} stays in float")
        return self.scheme

    @property
    def activation(self) -> ActivationFormat | None:
        """The format of its input; None where that stays in float."""
        return None if self.scheme is None else self.scheme.activation


@dataclass(frozen=True)
class LinearPlan(Planned):
    """The decision for one linear.

    Attributes:
        name: its module path; block: the block it is in; shape: (out_features, in_features).
        scheme: formats of weight and input; None keeps it in float.
        reason: why the scheme differs from what was asked for, or why there is none; empty when as asked.
        bytes: size of weight codes, scales and zero points in the file, or of the float32 weight.
        shares: the linear whose codes it reads, of the same weight before it; empty where they are its own.
        state: where it is the input of a recurrent layer, the weight of the states, which is rounded with it; None of
            any other, and where it stays float.
        given: the codes that the checkpoint holds, and that the scheme keeps; None where they are to be found.
    """

    name: str
    block: str
    shape: tuple[int, int]
    scheme: Scheme | None
    reason: str = ""
    bytes: int = 0
    shares: str = ""
    state: StateWeight | None = None
    given: GivenCodes | None = field(default=None, repr=False, compare=False)


_SHARED = "its weight is shared by several linears"


def _never_shared(weight: str, several_blocks: bool) -> tuple[bool, str]:
    return False, "which no method is known to allow"


def _nothing_against(linear: Linear, scheme: Scheme) -> str:
    return ""


def make_plan(
    graphs: Sequence[tuple[str, Graph]],
    scheme_for: Callable[[str], Scheme | None],
    given: Mapping[str, GivenCodes] | None = None,
    sharing: Callable[[str, bool], tuple[bool, str]] = _never_shared,
    whole_groups: bool = False,
    stays_float: Callable[[Linear, Scheme], str] = _nothing_against,
) -> list[LinearPlan]:
    """Decide for every linear of the blocks.

    Args:
        graphs: (block name, graph) in order.
        scheme_for: the scheme asked for by the path of a module; None for float.
        given: by weight, codes that are to be kept as they are.
        sharing: whether linears that have one weight can have one set of codes, by the weight and whether they are in
            several blocks, and why not, or what is to be said about it.
        whole_groups: take smaller groups where that saves bytes, see `Recipe`.
        stays_float: why a linear stays float though a scheme is asked for; empty where it need not.
    """
    found = [(block, linear) for block, graph in graphs for linear in linears(graph)]
    uses: dict[str, list[tuple[str, Linear]]] = {}
    for block, linear in found:
        uses.setdefault(linear.weight, []).append((block, linear))
    odd = {name for _, graph in graphs for name in _read_otherwise(graph)}
    constants = {node for _, graph in graphs for node in _constants(graph)}

    def reads_choice(linear: Linear) -> bool:
        return chooses(linear, linear.node.graph is graphs[-1][1])

    def decide(block: str, linear: Linear) -> LinearPlan:
        same = uses[linear.weight]
        asked, codes = scheme_for(module_of_call(linear.name)), (given or {}).get(linear.weight)
        if codes is not None:
            return _kept(linear, block, codes, len(same) > 1 or linear.weight in odd)
        empty, first = LinearPlan(linear.name, block, linear.shape, None), same[0][1]
        if asked is None:
            return replace(empty, reason=fit(None, linear.shape[1])[1])
        if any(reads_choice(other) for _, other in same):
            return replace(empty, reason="a router: its result picks experts")
        if linear.input in constants:
            return replace(empty, reason="what it reads is a constant, so that it is computed once, on loading")
        if why := stays_float(linear, asked):
            return replace(empty, reason=why)
        scheme, reason = fit(asked, linear.shape[1])
        if whole_groups and scheme is not None:
            scheme, reason = _whole(scheme, reason, linear.shape)
        if linear.weight in odd:
            return replace(empty, reason=_SHARED)
        if len(same) > 1:
            if any(scheme_for(module_of_call(other.name)) != asked for _, other in same):
                return replace(empty, reason=f"{_SHARED}, for which the recipe asks for different schemes")
            can, why = sharing(linear.weight, len({place for place, _ in same}) > 1)
            if not can:
                return replace(empty, reason=f"{_SHARED}, {why}")
            called_again = module_of_call(linear.name) == first.name
            whose = "its first call" if called_again else first.name
            notes = [reason, why, "" if linear is first else f"reads the codes of {whose}"]
            reason = "; ".join(note for note in notes if note)
        shares = "" if linear is first or scheme is None else first.name
        state = state_weight(linear) if scheme is not None else None
        return replace(empty, scheme=scheme, reason=reason, shares=shares, state=state)

    plans = [decide(block, linear) for block, linear in found]
    return [replace(plan, bytes=weight_bytes(plan)) for plan in plans]


def _read_otherwise(graph: Graph) -> set[str]:
    """Names of the weights of linears that something else reads too."""
    found = linears(graph)
    calls, weights = {linear.node for linear in found}, {linear.weight for linear in found}
    held = [node for node in graph.nodes if node.op == "get_attr" and node.target in weights]
    return {str(node.target) for node in held if not set(node.users) <= calls}


def _constants(graph: Graph) -> set[Node]:
    """Nodes whose values depend on no input of the graph."""
    found: set[Node] = set()
    for node in graph.nodes:
        made = node.op == "call_function" and all(given in found for given in node.all_input_nodes)
        if made or node.op == "get_attr":
            found.add(node)
    return found


def _kept(linear: Linear, block: str, codes: GivenCodes, shared: bool) -> LinearPlan:
    """What becomes of a linear whose codes are given."""
    weight = codes.weight
    if shared:
        why = "its codes become float: the weight is shared by several linears"
        return LinearPlan(linear.name, block, linear.shape, None, why)
    return LinearPlan(linear.name, block, linear.shape, weight.scheme, weight.kept, given=codes)


def fit(scheme: Scheme | None, in_features: int, whole: bool = False) -> tuple[Scheme | None, str]:
    """The scheme a layer of this width can take, and why it is not the one asked for.

    Args:
        whole: the last group may not be shorter than the others.
    """
    if scheme is None:
        return None, "kept in float by the recipe"
    return scheme.fit(in_features, whole)


def _whole(scheme: Scheme, reason: str, shape: tuple[int, int]) -> tuple[Scheme, str]:
    """A scheme whose smaller groups fill the rows of a weight (N, K), where that takes fewer bytes; else the same."""
    whole, why = scheme.fit(shape[1], whole=True)
    if whole is None or whole.bytes(shape, 4) >= scheme.bytes(shape, 4):
        return scheme, reason
    return whole, f"{why} take fewer bytes"


def weight_bytes(plan: LinearPlan, float_bytes: int = 4) -> int:
    """Bytes of the weight in the file: codes, scales and zero points, and offsets of the groups of given codes.

    Those of the weight of a recurrent layer's states, where it is rounded too, are among them.

    Args:
        float_bytes: of a number that stays float; the scales of integer products are float32 whatever it is.

    Returns:
        0 where the codes are another's.
    """
    out_features, in_features = plan.shape
    if plan.shares:
        return 0
    if plan.scheme is None:
        return out_features * in_features * float_bytes
    offsets = plan.given.weight.offsets if plan.given else 0
    states = plan.state.bytes(plan.scheme, float_bytes) if plan.state else 0
    return plan.scheme.bytes(plan.shape, float_bytes) + offsets * float_bytes + states
