"""Which input features of linears calibration data never made active: nothing is known of them, whatever the method."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.fx import GraphModule, Node

from ..capture.blocks import Block
from ..errors import PassError
from ..graph.meta import Meta
from ..graph.sites import linears, rows_of
from ..plan.linear_plan import LinearPlan
from .block_activations import Stream, collect

MANY = 0.1  # share of a linear's input features


class Coverage:
    """Collects the statistics that passes ask for, and counts on the way.

    Attributes:
        unseen: by name of the linear, how many of its input features were zero for every token; those with some.
    """

    def __init__(self, block: Block, stream: Stream | None) -> None:
        self._block, self._stream = block, stream
        self._known: set[str] = set()
        self.unseen: dict[str, int] = {}

    def collect(self, module: GraphModule, wanted: Mapping[Node, Callable[[], Any]]) -> dict[Node, Any]:
        """The filled statistics; see `block_activations.collect`.

        Raises:
            PassError: there is no calibration data.
        """
        if self._stream is None:
            raise PassError("asks for statistics, and there is no calibration data", place=self._block.name)
        found = collect(self._block, self._stream, module, wanted)
        for value, statistic in found.items():
            if not hasattr(statistic, "unseen"):
                continue
            # Whoever asks first sees the values that are nearest to the model's; factors do not wake a feature.
            names = _readers(module, value) - self._known
            self._known |= names
            if names and (count := int(statistic.unseen().sum())):
                self.unseen |= dict.fromkeys(sorted(names), count)
        return found


def _readers(module: GraphModule, value: Node) -> set[str]:
    """Names of the linears, rounded or not, that read the features of a value."""
    whole = {linear.name for linear in linears(module.graph) if value in (linear.input, rows_of(linear))}
    products = (user for user in value.users if Meta.PLANE_OF not in user.meta)
    rounded = {product.meta[Meta.LINEAR] for product in products if Meta.LINEAR in product.meta}
    return whole | rounded


def unseen_shares(unseen: Mapping[str, int], plan: Iterable[LinearPlan]) -> dict[str, float]:
    """By name of the quantized linear, the share of its input features that were never active; those with some."""
    features = {p.name: p.shape[1] for p in plan if p.scheme is not None}
    return {name: count / features[name] for name, count in unseen.items() if name in features}


def warning(shares: Mapping[str, float]) -> str:
    """A sentence about linears with many features that were never active; empty where there are none."""
    many = {name: share for name, share in shares.items() if share >= MANY}
    if not many:
        return ""
    worst = max(many, key=many.__getitem__)
    others = f" (of {len(many)} linears it left {MANY:.0%} or more so)" if len(many) > 1 else ""
    return (
        f"calibration never made {many[worst]:.1%} of the input features of {worst} active{others}: their weights are "
        "rounded, and static ranges chosen, without data about them; calibrate on more varied data"
    )
