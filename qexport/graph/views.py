"""Calls as what they are: a class for each kind of call that code asks about, its fields named as in the schema.

`of` reads a node that must be such a call, `match` one that may be. aten calls its first operand "self"; it is x here.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch.fx import Graph, Node

from . import ops as _ops  # noqa: F401  registers the operators
from .meta import Meta
from .schema import bind

aten = torch.ops.aten
ops = torch.ops.qexport
END = 2**63 - 1  # of a slice that reaches as far as there is something

Operand = Node | int | float


def operand(node: Node) -> Node:
    """What a call works on: its first argument, where that is a value.

    Raises:
        TypeError: it is none.
    """
    first = node.args[0] if node.args else None
    if not isinstance(first, Node):
        raise TypeError(f"{node} works on no value: {first}")
    return first


def tensor_name(node: Node) -> str:
    """The name of the tensor that a get_attr node reads.

    Raises:
        TypeError: it is no such node.
    """
    if node.op != "get_attr" or not isinstance(node.target, str):
        raise TypeError(f"{node} reads no tensor of its module")
    return node.target


def sizes_of(node: Node) -> tuple[int, ...]:
    """Shape of a value whose sizes are all known, as those of weights are.

    Raises:
        TypeError: one is dynamic.
    """
    return tuple(size_at(node, axis) for axis in range(len(node.meta[Meta.SPEC].shape)))


def size_at(node: Node, axis: int) -> int:
    """The size of an axis that is known.

    Raises:
        TypeError: it is dynamic.
    """
    size = node.meta[Meta.SPEC].shape[axis]
    if not isinstance(size, int):
        raise TypeError(f"axis {axis} of {node} has a dynamic size: {size}")
    return size


def results_of(graph: Graph) -> tuple[Node, ...]:
    """What the graph of a block returns."""
    results = graph.output_node().args[0]
    if not isinstance(results, (tuple, list)):
        raise TypeError(f"a block returns a tuple, and this one {results}")
    nodes = tuple(node for node in results if isinstance(node, Node))
    if len(nodes) < len(results):
        raise TypeError(f"a block returns values of nodes, and this one {results}")
    return nodes


@dataclass(frozen=True)
class _View:
    """A call of one of the operators in `targets`.

    Attributes:
        named: what the schemas call a field, where that is something else; several names where the operators differ.
    """

    targets: ClassVar[tuple[Any, ...]]
    named: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}

    @classmethod
    def match(cls, node: object) -> Self | None:
        """The call that a node makes, None where it makes another one or none."""
        if not isinstance(node, Node) or node.op != "call_function" or node.target not in cls.targets:
            return None
        given = vars(bind(node))
        return cls(**{f.name: given[cls._argument(f.name, given)] for f in fields(cls)})

    @classmethod
    def _argument(cls, field: str, given: Mapping[str, Any]) -> str:
        """What the operator calls a field."""
        name = cls.named.get(field, field)
        return name if isinstance(name, str) else next(n for n in name if n in given)

    @classmethod
    def of(cls, node: object) -> Self:
        """The call that a node makes.

        Raises:
            TypeError: it makes another one or none.
        """
        if (found := cls.match(node)) is None:
            raise TypeError(f"{node} is no call of {' or '.join(map(str, cls.targets))}")
        return found


@dataclass(frozen=True)
class DequantizeLinear(_View):
    """What codes stand for; block_size 0: one scale per channel or tensor."""

    targets = (ops.dequantize_linear.default,)
    codes: Node
    scale: Node
    zero_point: Node | None
    axis: int
    block_size: int
    bits: int


@dataclass(frozen=True)
class QuantizeLinear(_View):
    """A float value as 8-bit codes."""

    targets = (ops.quantize_linear.default,)
    x: Node
    scale: Node
    zero_point: int
    signed: bool


@dataclass(frozen=True)
class ExpandCodes(_View):
    """Codes in groups as int8 codes with one scale per output channel."""

    targets = (ops.expand_codes.default,)
    codes: Node
    scale: Node
    zero_point: Node | None
    factor: Node | None
    row_scale: Node
    group_size: int
    bits: int


@dataclass(frozen=True)
class MatMulNBits(_View):
    """A product with a weight in groups, as one kernel."""

    targets = (ops.matmul_nbits.default,)
    x: Node
    codes: Node
    scale: Node
    zero_point: Node | None
    bits: int
    group_size: int
    block_size: int


@dataclass(frozen=True)
class ExpertShares(_View):
    """What every token gives each expert: the weights of those it chose, 0 for others."""

    targets = (ops.expert_shares.default,)
    index: Node
    weights: Node
    experts: int


@dataclass(frozen=True)
class RoundCache(_View):
    """Keys or values rounded to the grid of a cache of codes."""

    targets = (ops.round_cache.default,)
    x: Node
    scale: Node
    bits: int


@dataclass(frozen=True)
class RoundE4M3(_View):
    """A value rounded to E4M3 numbers times a scale."""

    targets = (ops.round_e4m3.default,)
    x: Node
    scale: Node


@dataclass(frozen=True)
class CausalMask(_View):
    """The mask of a decoder, from the attention mask."""

    targets = (ops.causal_mask.default,)
    attention_mask: Node
    past_length: Operand
    window: int
    chunk: int


@dataclass(frozen=True)
class CachedAttention(_View):
    """Attention that reads a cache, and returns it with the new keys and values behind."""

    targets = (ops.cached_attention.default,)
    query: Node
    key: Node
    value: Node
    past_key: Node
    past_value: Node
    mask: Node
    scale: float
    softcap: float
    sinks: Node | None


@dataclass(frozen=True)
class RotaryEmbedding(_View):
    """All features of every head, rotated."""

    targets = (ops.rotary_embedding.default,)
    x: Node
    cos: Node
    sin: Node


@dataclass(frozen=True)
class LinearCall(_View):
    """x W^T + b, whatever the weight [out, in] is."""

    targets = (aten.linear.default,)
    named = {"x": "input"}
    x: Node
    weight: Node
    bias: Node | None


@dataclass(frozen=True)
class RecurrentSteps(_View):
    """The steps of a recurrent layer in one direction, its weight a tensor [gates * hidden, hidden]."""

    targets = (ops.recurrent_steps.default,)
    gates: Node
    hidden: Node
    cell: Node | None
    weight: Node
    bias: Node | None
    lengths: Node | None
    reverse: bool
    kind: str


@dataclass(frozen=True)
class Convolution(_View):
    """A convolution with a weight [out, in / groups, ...]."""

    targets = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
    named = {"x": "input"}
    x: Node
    weight: Node
    bias: Node | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


@dataclass(frozen=True)
class Embedding(_View):
    """Rows of a table [rows, features]."""

    targets = (aten.embedding.default,)
    named = {"table": "weight", "ids": "indices"}
    table: Node
    ids: Node


@dataclass(frozen=True)
class Norm(_View):
    """A norm over the last axes, of root mean squares or of a layer."""

    targets: ClassVar[tuple[Any, ...]] = (aten.rms_norm.default, aten.layer_norm.default)
    named = {"x": "input"}
    x: Node
    weight: Node | None


@dataclass(frozen=True)
class LayerNorm(Norm):
    """A norm that takes the mean out."""

    targets = (aten.layer_norm.default,)
    bias: Node | None


@dataclass(frozen=True)
class AnyAttention(_View):
    """Attention with keys and values at hand, or with a cache."""

    targets = (aten.scaled_dot_product_attention.default, ops.cached_attention.default)
    query: Node
    key: Node
    value: Node


@dataclass(frozen=True)
class Matmul(_View):
    """A product; of a quantized linear: of what it reads and its weight [K, N]."""

    targets = (aten.matmul.default,)
    named = {"x": "self", "weight": "other"}
    x: Node
    weight: Node


@dataclass(frozen=True)
class _Binary(_View):
    named = {"x": "self"}
    x: Node
    other: Operand

    @property
    def operands(self) -> tuple[Operand, Operand]:
        return self.x, self.other


@dataclass(frozen=True)
class Add(_Binary):
    """x + alpha * other."""

    targets = (aten.add.Tensor,)
    alpha: int | float


@dataclass(frozen=True)
class Mul(_Binary):
    """x * other."""

    targets = (aten.mul.Tensor,)


@dataclass(frozen=True)
class Div(_Binary):
    """x / other."""

    targets = (aten.div.Tensor,)


@dataclass(frozen=True)
class Cast(_View):
    """A value in another dtype."""

    targets = (aten.to.dtype,)
    named = {"x": "self"}
    x: Node
    dtype: torch.dtype


@dataclass(frozen=True)
class Clamp(_View):
    """A value held within bounds."""

    targets = (aten.clamp.default,)
    named = {"x": "self", "low": "min", "high": "max"}
    x: Node
    low: Operand | None
    high: Operand | None


@dataclass(frozen=True)
class Shaped(_View):
    """The same elements, or copies of them, in another shape."""

    targets: ClassVar[tuple[Any, ...]] = (
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default,
    )  # fmt: skip
    named = {"x": "self", "shape": ("size", "shape")}
    x: Node
    shape: Sequence[int | Node]


@dataclass(frozen=True)
class Reshape(Shaped):
    """The same elements in another shape."""

    targets = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Transpose(_View):
    """Two axes exchanged."""

    targets = (aten.transpose.int,)
    named = {"x": "self"}
    x: Node
    dim0: int
    dim1: int


@dataclass(frozen=True)
class Permute(_View):
    """Axes in another order."""

    targets = (aten.permute.default,)
    named = {"x": "self"}
    x: Node
    dims: Sequence[int]


@dataclass(frozen=True)
class Unsqueeze(_View):
    """An axis of size 1 more."""

    targets = (aten.unsqueeze.default,)
    named = {"x": "self"}
    x: Node
    dim: int


@dataclass(frozen=True)
class Select(_View):
    """One place of an axis, which is gone then."""

    targets = (aten.select.int,)
    named = {"x": "self"}
    x: Node
    dim: int
    index: int | Node


@dataclass(frozen=True)
class Repeat(_View):
    """Copies of a value along its axes."""

    targets = (aten.repeat.default,)
    named = {"x": "self"}
    x: Node
    repeats: Sequence[int | Node]


@dataclass(frozen=True)
class Gather(_View):
    """Elements of an axis by their places."""

    targets = (aten.gather.default,)
    named = {"x": "self"}
    x: Node
    dim: int
    index: Node


@dataclass(frozen=True)
class Index(_View):
    """Elements by tensors of places, one for each of the first axes."""

    targets = (aten.index.Tensor,)
    named = {"x": "self"}
    x: Node
    indices: Sequence[Node | None]


@dataclass(frozen=True)
class Cat(_View):
    """Values one behind the other along an axis."""

    targets = (aten.cat.default, aten.concat.default)
    tensors: Sequence[Node]
    dim: int


@dataclass(frozen=True)
class Slice(_View):
    """A part of an axis."""

    targets = (aten.slice.Tensor,)
    named = {"x": "self"}
    x: Node
    dim: int
    start: int | Node | None
    end: int | Node | None
    step: int

    @property
    def bounds(self) -> tuple[int | Node, int | Node]:
        """[start, end), as numbers where nothing is said."""
        return 0 if self.start is None else self.start, END if self.end is None else self.end


@dataclass(frozen=True)
class Item(_View):
    """One of several results."""

    targets = (operator.getitem,)
    source: Node
    index: int


@dataclass(frozen=True)
class Size(_View):
    """The size of an axis."""

    targets = (aten.sym_size.int,)
    named = {"x": "self"}
    x: Node
    dim: int
