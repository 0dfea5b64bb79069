"""A quantized block whose scales, zero points, norms and codes can be trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from ..errors import PassError
from ..graph.edit import is_call
from ..graph.meta import Meta
from ..graph.schema import bind
from ..graph.sites import norm_bias, norm_gain
from ..graph.views import DequantizeLinear, Norm, tensor_name
from ..passes.formats.codebooks import ops
from ..quant.coarse_scales import coarse
from ..quant.dequantize_through import dequantize_through
from ..quant.formats.codebooks import CODEBOOKS
from ..quant.learned_codes import round_through
from ..quant.straight_through import Descent, through

_LOOKUP = ops.gather_quantized.default
_TABLE = ops.dequantize_codebook.default
# Quantizes activations, or the cache: a gradient does not come back through it.
_STEPS = (
    ops.quantize_linear.default, ops.token_scale.default, ops.matmul_integer.default, ops.round_cache.default,
    ops.round_e4m3.default, ops.expand_codes.default,
)  # fmt: skip
_SQUARES = 0.99  # fewer steps than where one weight is trained, so a shorter memory


class Tuned:
    """A tensor in training: its value follows from where it began and from how far it went.

    Args:
        start: as it is in the block.
        rate: length of the first step: a share of the value, or, of whole numbers, what is added.
        whole: the least and the largest of whole numbers, which are rounded on the way forward; None for others.
        kept: rounds others on the way forward to what the file can keep; None where that is all floats.
    """

    def __init__(
        self, start: Tensor, rate: float, whole: tuple[float, float] | None = None,
        kept: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._start, self._whole, self._kept = start, whole, kept
        self._way = torch.zeros(start.shape, dtype=torch.float32, device=start.device)
        self._descent = Descent(self._way, rate, _SQUARES)
        self._gradient: Tensor | None = None

    def value(self) -> tuple[Tensor, Tensor]:
        """What the block reads, and the leaf that its gradient belongs to."""
        leaf = self._way.detach().requires_grad_(torch.is_grad_enabled())
        return self._of(leaf), leaf

    def add(self, gradient: Tensor | None) -> None:
        """Remember a part of the gradient."""
        if gradient is not None:
            self._gradient = gradient if self._gradient is None else self._gradient.add_(gradient)

    @torch.no_grad()
    def step(self, left: float) -> None:
        """Go against the gradient by about the rate times `left`."""
        if (gradient := self._gradient) is None:
            return
        self._gradient = None
        self._descent.update(gradient, left)
        if self._whole is not None:
            start, (least, most) = self._start.float(), self._whole
            torch.minimum(torch.maximum(self._way, least - start), most - start, out=self._way)

    @torch.no_grad()
    def settled(self) -> Tensor:
        """The value in the dtype that it began with."""
        return self._of(self._way).to(self._start.dtype)

    def _of(self, way: Tensor) -> Tensor:
        if self._whole is not None:
            return round_through(self._start.float() + way)
        value = self._start * way.exp()
        return value if self._kept is None else through(value, self._kept(value.detach()))


@dataclass(frozen=True)
class Rates:
    """First steps: of scales and norms as a share, of zero points and codes in steps between codes; 0 keeps them."""

    scales: float
    norms: float
    zeros: float
    codes: float


def find_tuned(module: GraphModule, rates: Rates, load: Callable[[str], Tensor]) -> dict[str, Tuned]:
    """By name, the tensors of a block that are to be trained.

    Args:
        load: reads a tensor of the block.

    Raises:
        PassError: the block quantizes activations or its cache.
    """
    _check(module.graph)
    found: dict[str, Tuned] = {}

    def add(
        name: str | None, rate: float, whole: Callable[[Tensor], tuple[float, float]] | None = None,
        kept: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if name is not None and rate and name not in found:
            start = load(name)
            found[name] = Tuned(start, rate, None if whole is None else whole(start), kept)

    def add_scale(scale: Node, groups: int) -> None:
        add(_name(scale), rates.scales, kept=partial(coarse, dim=groups) if Meta.COARSE in scale.meta else None)

    for node in module.graph.nodes:
        codes, scale, zero, bits = _parts(node)
        if scale is not None:
            add_scale(scale, 0)
            add(_name(zero), rates.zeros, partial(_all_of, bits))
            if codes is not None and Meta.ODD not in codes.meta:  # between odd codes there are none to move over
                add(_name(codes), rates.codes, _used)
        elif is_call(node, _TABLE):  # whose codes are no numbers that could move
            add_scale(bind(node).scale, -1)
        elif is_call(node, *Norm.targets):
            for name in _of_norm(node):
                add(name, rates.norms)
    return found


def _all_of(bits: int, zero: Tensor) -> tuple[float, float]:
    return 0.0, float(2**bits - 1)


def _used(codes: Tensor) -> tuple[float, float]:
    """Codes of 3 bits are stored in 4, and stay 3."""
    return float(codes.min()), float(codes.max())


def _name(node: Node | None) -> str | None:
    """Of a tensor of the block; None for what is computed."""
    return tensor_name(node) if node is not None and node.op == "get_attr" else None


def _of_norm(node: Node) -> tuple[str | None, str | None]:
    """The gain of a norm and its bias, where they are tensors of the block."""
    try:
        return norm_gain(node)[0], norm_bias(node)
    except TypeError:
        return None, None


def _parts(node: Node) -> tuple[Node | None, Node | None, Node | None, int]:
    """Codes, scale, zero point and stored bits of what dequantizes a weight or looks up its rows."""
    found = DequantizeLinear.match(node)
    if found is not None:
        return found.codes, found.scale, found.zero_point, found.bits
    if is_call(node, _LOOKUP):
        codes, scale, zero = (part if isinstance(part, Node) else None for part in node.args[:3])
        return codes, scale, zero, int(vars(bind(node))["bits"])
    return None, None, None, 0


def _check(graph: Graph) -> None:
    for node in graph.nodes:
        if is_call(node, *_STEPS):
            raise PassError(
                f"{node.name} rounds activations or the cache, and no gradient comes back through that",
                remedy="Leave out tune, or take a scheme with float activations and a float cache",
            )


class TunedRun(Interpreter):
    """A pass through a block with the present values of what is trained.

    Args:
        tuned: by name of the tensor; those of other blocks do not matter.
    """

    def __init__(self, module: GraphModule, tuned: Mapping[str, Tuned]) -> None:
        super().__init__(module)
        names = {n.target for n in module.graph.nodes if n.op == "get_attr"}
        made = {name: tensor.value() for name, tensor in tuned.items() if name in names}
        self._values = {name: value for name, (value, _) in made.items()}
        self.leaves: dict[str, Tensor] = {name: leaf for name, (_, leaf) in made.items()}

    def run_node(self, node: Node) -> Any:
        if node.op == "get_attr" and node.target in self._values:
            return self._values[node.target]
        if DequantizeLinear.match(node) is not None:
            (codes, scale, zero, axis, size, _), _ = self.fetch_args_kwargs_from_env(node)
            if codes.dim() == 2:
                return dequantize_through(codes, scale, zero, axis, size)
        if is_call(node, _TABLE):
            (codes, scale, book, size), _ = self.fetch_args_kwargs_from_env(node)
            values = CODEBOOKS[book].table().to(codes.device)[codes.t().int()]
            return dequantize_through(values, scale.t(), None, 0, size)
        if is_call(node, _LOOKUP):
            (codes, scale, zero, ids, size, _), _ = self.fetch_args_kwargs_from_env(node)
            flat = ids.reshape(-1)
            taken = None if zero is None else zero.index_select(1, flat)
            rows = dequantize_through(codes.index_select(1, flat), scale.index_select(1, flat), taken, 0, size)
            return rows.t().reshape(*ids.shape, codes.shape[0])
        return super().run_node(node)


def gradients(
    run: TunedRun, inputs: Sequence[Tensor], ends: Sequence[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor | None], list[Tensor | None]]:
    """Of a block's trained tensors, and of its inputs.

    Args:
        inputs: those that gradients are wanted for.
        ends: results and their gradients.
    """
    starts = [*run.leaves.values(), *inputs]
    ends = [(result, gradient) for result, gradient in ends if result.requires_grad]
    if not starts or not ends:
        return {}, [None] * len(inputs)
    found = torch.autograd.grad([r for r, _ in ends], starts, [g for _, g in ends], allow_unused=True)
    return dict(zip(run.leaves, found, strict=False)), list(found[len(run.leaves) :])
