"""The residual stream of a model: who writes into it, who reads it, and what stands in the way of changing its basis.

It is followed through the graphs of all blocks from the values that blocks hand on, backwards to what makes them and
forwards to who reads them. No architecture is named: parallel attention, experts and embeddings of positions are found
by what is computed.
"""

import operator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ...capture.blocks import Block
from ...capture.graph import CapturedModel
from ...errors import PassError
from ...graph.edit import is_call, shape_of
from ...graph.meta import Meta
from ...graph.schema import bind
from ...graph.sites import SHAPE_ONLY, Linear, linear_at
from ...graph.views import operand, results_of, size_at

aten = torch.ops.aten
_SUMS = (aten.add.Tensor, aten.sub.Tensor, operator.add)
_SCALED = (aten.mul.Tensor, aten.div.Tensor)
# Keep each row, or take some rows: the last dimension is what it was.
_ROWS = (
    *SHAPE_ONLY, aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.alias.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.select.int,
    aten.index.Tensor, aten.index_select.default, aten.flatten.using_ints, aten.dropout.default,
)  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """A norm of the stream and the linears that read it."""

    block: Block
    node: Node
    readers: tuple[tuple[Block, Linear], ...]


@dataclass
class ResidualStream:
    """Everything that touches the residual stream of a model.

    Attributes:
        width: of a row.
        tables: names of tensors whose rows are looked up and put into the stream, [n, width].
        vectors: names of tensors added to every row, [width].
        writers: linears whose results are added to it.
        norms: norms of it, with their readers.
        readers: linears that read it without a norm.
        crossing: names of the values of the stream that one block makes and another reads.
    """

    width: int
    tables: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    writers: list[tuple[Block, Linear]] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    readers: list[tuple[Block, Linear]] = field(default_factory=list)
    crossing: list[str] = field(default_factory=list)


def residual_stream(captured: CapturedModel) -> ResidualStream:
    """Find the residual stream of a model of several blocks.

    Raises:
        PassError: there is none, or something writes into it or reads it that a change of basis cannot pass.
    """
    return _Walk(captured).stream


class _Walk:
    def __init__(self, captured: CapturedModel):
        self._makers: dict[str, tuple[Block, Node]] = {}
        self._takers: dict[str, list[tuple[Block, Node]]] = {}
        self._results = {port.value for port in captured.outputs}
        for block in captured.blocks:
            made = results_of(block.module.graph)
            self._makers |= {name: (block, node) for name, node in zip(block.outputs, made, strict=True)}
            placeholders = [n for n in block.module.graph.nodes if n.op == "placeholder"]
            for name, node in zip(block.inputs, placeholders, strict=True):
                self._takers.setdefault(name, []).append((block, node))
        if len(captured.blocks) < 2:
            raise PassError("the model is one block, so nothing crosses blocks")
        block, start = self._makers[captured.handed_on(captured.blocks[0])]
        if len(shape_of(start)) < 2 or not isinstance(shape_of(start)[-1], int):
            raise PassError(f"{start.name} is handed on between blocks, and its rows have no fixed length")
        self.stream = ResidualStream(size_at(start, -1))
        self._seen: set[Node] = set()
        self._waiting = [(block, start)]
        while self._waiting:
            block, node = self._waiting.pop()
            if node not in self._seen:
                self._seen.add(node)
                self._made_by(block, node)
                self._read_by(block, node)

    def _push(self, block: Block, node: Node) -> None:
        self._waiting.append((block, node))

    def _is_row(self, value: object) -> bool:
        return isinstance(value, Node) and shape_of(value)[-1:] == (self.stream.width,)

    def _made_by(self, block: Block, node: Node) -> None:
        """Go to what makes a value of the stream, or note that a linear, a table or a vector does."""
        if node.op == "placeholder":
            name = block.inputs[[n for n in block.module.graph.nodes if n.op == "placeholder"].index(node)]
            if name not in self._makers:
                raise PassError(f"the residual stream comes in as {name}, an input of the model")
            self._push(*self._makers[name])
        elif node.op == "get_attr":
            if len(shape_of(node)) != 1:
                raise PassError(f"{node.target} is added to the residual stream, and is neither a table nor a vector")
            self.stream.vectors.append(str(node.target))
        elif (linear := linear_at(node)) is not None:
            self.stream.writers.append((block, linear))
        elif is_call(node, aten.embedding.default):
            weight = bind(node).weight
            if weight.op != "get_attr":
                raise PassError(f"{node.name} looks up rows of a table that is computed")
            self.stream.tables.append(weight.target)
        else:
            for source in self._sources(node):
                self._push(block, source)

    def _sources(self, node: Node) -> list[Node]:
        """The values of the stream that a call combines linearly, channel by channel alike."""
        given = [argument for argument in node.args if isinstance(argument, Node)]
        if is_call(node, *_SUMS):
            if len(given) == 2 and all(self._is_row(value) for value in given) and node.kwargs.get("alpha", 1) == 1:
                return given
        elif is_call(node, *_SCALED):
            rows = [value for value in given if self._is_row(value)]
            others = [value for value in given if value not in rows]
            by_row = all(shape_of(value)[-1:] in ((), (1,)) for value in others)
            if len(rows) == 1 and by_row and (is_call(node, aten.mul.Tensor) or node.args[0] is rows[0]):
                return rows
        elif is_call(node, *_ROWS):
            source = operand(node)
            if self._is_row(source) and not _takes_channels(node):
                return [source]
        elif is_call(node, aten.sum.dim_IntList):
            call = bind(node)
            last = len(shape_of(call.self)) - 1
            if self._is_row(call.self) and all(d % (last + 1) != last for d in call.dim):
                return [call.self]
        raise PassError(f"{_place(node)} makes a part of the residual stream by {_called(node)}")

    def _read_by(self, block: Block, node: Node) -> None:
        """Go on to the readers of a value of the stream that hand it on, and note norms and linears."""
        for user in node.users:
            if user.op == "output":
                for name in (n for n, made in zip(block.outputs, results_of(user.graph), strict=True) if made is node):
                    if name in self._results:
                        raise PassError(f"{name}, of the residual stream, is an output of the model")
                    if name not in self.stream.crossing:
                        self.stream.crossing.append(name)
                    for taker in self._takers.get(name, ()):
                        self._push(*taker)
            elif is_call(user, aten.sym_size.int):
                continue
            elif is_call(user, aten.rms_norm.default, aten.layer_norm.default):
                self._norm(block, user)
            elif (linear := linear_at(user)) is not None:
                if (block, linear) not in self.stream.readers:
                    self.stream.readers.append((block, linear))
            elif self._hands_on(user, node):
                self._push(block, user)
            else:
                raise PassError(f"{_place(user)} reads the residual stream by {_called(user)}")

    def _hands_on(self, user: Node, node: Node) -> bool:
        """Whether a call of a value of the stream is a value of the stream."""
        try:
            return self._is_row(user) and node in self._sources(user)
        except PassError:
            return False

    def _norm(self, block: Block, norm: Node) -> None:
        if list(bind(norm).normalized_shape) != [self.stream.width]:
            raise PassError(f"{_place(norm)} norms parts of a row")
        readers: list[tuple[Block, Linear]] = []
        waiting = [(block, norm)]
        while waiting:
            here, value = waiting.pop()
            for user in value.users:
                if user.op == "output":
                    outputs = zip(here.outputs, results_of(user.graph), strict=True)
                    for name in (n for n, made in outputs if made is value):
                        if name in self._results:
                            raise PassError(f"{name}, the norm of the residual stream, is an output of the model")
                        waiting += self._takers.get(name, ())
                elif (linear := linear_at(user)) is not None and linear.input is value:
                    readers.append((here, linear))
                elif is_call(user, *_ROWS) and self._is_row(user) and not _takes_channels(user):
                    waiting.append((here, user))
                elif not is_call(user, aten.sym_size.int):
                    raise PassError(f"{_place(user)} reads a norm of the residual stream by {_called(user)}")
        self.stream.norms.append(Norm(block, norm, tuple(readers)))


def _takes_channels(node: Node) -> bool:
    """Whether a call that takes rows takes channels instead: a slice or a choice along the last dimension."""
    if is_call(node, aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.unsqueeze.default):
        rank = len(shape_of(operand(node))) + is_call(node, aten.unsqueeze.default)
        return int(bind(node).dim) % rank == rank - 1
    if is_call(node, aten.index.Tensor):
        return len(bind(node).indices) >= len(shape_of(operand(node)))
    return False


def _place(node: Node) -> str:
    return node.meta.get(Meta.MODULE_PATH) or node.name


def _called(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
