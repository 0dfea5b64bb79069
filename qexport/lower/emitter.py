"""Collecting ONNX nodes and initializers while a graph is translated."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch.fx import Node

from ..errors import LoweringError
from ..graph.edit import dtype_of, is_call, shape_of
from ..graph.meta import Meta
from ..graph.views import Size, tensor_name
from ..quant.float_types import FLOAT_TYPES
from ..quant.narrowing import narrowed, narrowed_number
from ..quant.packing import pack_int4, pack_rows
from .operator_set import NATIVE, OperatorSet

ONNX_DTYPE = {dtype: ir.DataType(kind.onnx) for dtype, kind in FLOAT_TYPES.items()} | {
    torch.float64: ir.DataType.DOUBLE, torch.int64: ir.DataType.INT64, torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16, torch.int8: ir.DataType.INT8, torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL, torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.float8_e8m0fnu: ir.DataType.FLOAT8E8M0,
}  # fmt: skip
VIEW_OF = "view_of"  # in the meta of an initializer: the one whose bytes it is made of
_FEW_BITS = {
    (4, torch.int8): ir.DataType.INT4, (4, torch.uint8): ir.DataType.UINT4,
    (2, torch.int8): ir.DataType.INT2, (2, torch.uint8): ir.DataType.UINT2,
}  # fmt: skip

Number = int | float | bool
Attribute = int | float | str | Sequence[int] | Sequence[str] | ir.DataType | ir.TensorProtocol | ir.Graph | None


class Emitter:
    """The ONNX graph under construction.

    Args:
        operators: those that it may be made of.
        prompts_in_floats: as `Target.prompts_in_floats`.

    Attributes:
        operators, prompts_in_floats: the same.
        values: the ONNX value of every fx node translated so far that has one.
        results: the ONNX values of every fx node translated so far that has several.
        nodes: ONNX nodes in order.
        initializers: by name.
    """

    def __init__(self, operators: OperatorSet = NATIVE, prompts_in_floats: bool = False) -> None:
        self.operators, self.prompts_in_floats = operators, prompts_in_floats
        self.values: dict[Node, ir.Value] = {}
        self.results: dict[Node, tuple[ir.Value, ...]] = {}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._shared: dict[tuple[str, str], ir.Value] = {}  # by prefix and name
        self._scope, self._prefix = "", ""
        self._taken: dict[str, int] = {}
        self._read: Callable[[str], torch.Tensor]  # from the first block on

    def enter(self, scope: str, read: Callable[[str], torch.Tensor]) -> None:
        """Start a block: its name, and how its tensors are read when the file is written."""
        self._scope, self._read = scope, read

    @contextmanager
    def branch(self, prefix: str) -> Iterator[list[ir.Node]]:
        """Nodes added within go to the list this gives, the names of all they make beginning with `prefix`."""
        nodes, outer = self.nodes, self._prefix
        self.nodes, self._prefix = [], outer + prefix
        try:
            yield self.nodes
        finally:
            self.nodes, self._prefix = nodes, outer

    def shared(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` adds the first time that this is asked for, and the same from then on."""
        key = self._prefix, name
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def named(self, name: str) -> str:
        """What a node or value of this name is called where nodes are added now."""
        return self._prefix + name

    def fresh(self, name: str) -> str:
        """The same, of what several blocks have one of."""
        return self._unique(self.named(name))

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        name: str = "",
        output: str = "",
        more: Mapping[str, Attribute] | None = None,
        **attributes: Attribute,
    ) -> ir.Value:
        """Add a node of one output.

        Args:
            inputs: None is an absent one.
            name, output: of the node and of its output; counted by operator where they are empty.
            attributes: None is an absent one.
            more: attributes of a node that has them in some cases only, behind the others.
        """
        return self.several(1, op_type, *inputs, domain=domain, name=name, output=output, more=more, **attributes)[0]

    def several(
        self,
        outputs: int,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        name: str = "",
        output: str = "",
        more: Mapping[str, Attribute] | None = None,
        **attributes: Attribute,
    ) -> tuple[ir.Value, ...]:
        """Add a node with this many outputs; see `op`."""
        name = self._unique(self.named(name or f"{self._scope}/{op_type}"))
        output = output and self._unique(self.named(output))
        made = tuple(ir.Value(name=output if output and i == 0 else f"{name}:{i}") for i in range(outputs))
        while inputs and inputs[-1] is None:  # ONNX Runtime's fusions count a trailing absent input as present
            inputs = inputs[:-1]
        given = {k: v for k, v in (*attributes.items(), *(more or {}).items()) if v is not None}
        self.nodes.append(ir.node(op_type, list(inputs), given, domain=domain, outputs=made, name=name))
        return made

    def constant(self, value: Number | Sequence[Any], dtype: torch.dtype = torch.int64) -> ir.Value:
        """A small constant: a number or a list of numbers, or of such lists."""
        array = tensor_adapters.TorchTensor(torch.tensor(value, dtype=dtype)).numpy()  # which knows bfloat16
        key = (array.tobytes(), array.shape, dtype)
        if key not in self._constants:
            name = self._unique(f"constant_{len(self._constants)}")
            self._constants[key] = self._initializer(name, ir.tensor(array, name=name))
        return self._constants[key]

    @overload
    def get(self, argument: Node | Number, dtype: torch.dtype | None = None, *, counts: bool = False) -> ir.Value: ...
    @overload
    def get(self, argument: None, dtype: torch.dtype | None = None, *, counts: bool = False) -> None: ...
    @overload
    def get(
        self, argument: Node | Number | None, dtype: torch.dtype | None = None, *, counts: bool = False
    ) -> ir.Value | None: ...

    def get(
        self, argument: Node | Number | None, dtype: torch.dtype | None = None, *, counts: bool = False
    ) -> ir.Value | None:
        """The ONNX value of an fx argument: a node, or a number that becomes a constant of `dtype`.

        Args:
            counts: values are added to the number or multiplied by it, see `narrowing.narrowed_number`.

        Raises:
            NumericsError: a number that counts is beyond the range of `dtype`.
        """
        if argument is None:
            return None
        if not isinstance(argument, Node):
            if dtype is not None:
                argument = narrowed_number(argument, dtype, self._scope, counts=counts)
            return self.constant(argument, dtype or torch.int64)
        if argument.op == "get_attr":
            return self.tensor(argument)
        value = self.values[argument]
        if dtype is not None and dtype_of(argument) != dtype:
            return self.op("Cast", value, to=ONNX_DTYPE[dtype])
        return value

    def tensor(
        self, node: Node, *, bits: int = 8, transpose: bool = False, times: int = 1, rows: int | None = None
    ) -> ir.Value:
        """The initializer of a get_attr node, read only when the file is written.

        Args:
            bits: 4 packs two codes in a byte, 2 packs four.
            transpose: store the transpose of the matrix.
            times: store every row so many times in a row; rows: no more than these.
        """
        source, read, spec = tensor_name(node), self._read, node.meta[Meta.SPEC]
        name = source + (".T" if transpose else "") + (".blocks" if times > 1 else "")
        if name in self.initializers:
            return self.initializers[name]
        dtype = ONNX_DTYPE[spec.dtype] if bits == 8 else _FEW_BITS[bits, spec.dtype]
        sizes = tuple(spec.shape[::-1] if transpose else spec.shape)
        shape = ir.Shape(sizes if times == 1 else (rows or sizes[0] * times, *sizes[1:]))

        def load() -> ir.TensorProtocol:
            tensor = _as_spec(node, read)
            tensor = tensor.t() if transpose else tensor
            tensor = tensor.repeat_interleave(times, dim=0)[:rows] if times > 1 else tensor
            if bits < 8:
                return ir.PackedTensor(_packed(tensor, bits).numpy(), dtype, shape=shape, name=name)
            return tensor_adapters.TorchTensor(tensor.contiguous(), name=name)

        return self._initializer(name, ir.LazyTensor(load, dtype=dtype, shape=shape, name=name))

    def derived(
        self,
        node: Node,
        suffix: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        make: Callable[..., torch.Tensor],
        *others: Node | None,
    ) -> ir.Value:
        """An initializer made from the tensor of a get_attr node, when the file is written.

        Args:
            suffix: its name is the tensor's with this behind.
            shape, dtype: of what `make` returns for the tensor and those of `others`, None for None.
        """
        name, read, sources = f"{node.target}.{suffix}", self._read, (node, *others)

        def load() -> torch.Tensor:
            return make(*(None if source is None else _as_spec(source, read) for source in sources))

        return self._made(name, shape, dtype, load)

    def stacked(
        self,
        name: str,
        nodes: Sequence[Node],
        shape: Sequence[int],
        dtype: torch.dtype,
        make: Callable[[torch.Tensor], torch.Tensor],
    ) -> ir.Value:
        """An initializer of what `make` returns for the tensor of each get_attr node, read one by one, in one stack.

        Args:
            shape, dtype: of the whole.
        """
        read = self._read

        def load() -> torch.Tensor:
            whole = torch.empty(*shape, dtype=dtype)
            for place, node in zip(whole, nodes, strict=True):
                place.copy_(make(_as_spec(node, read)))
            return whole

        return self._made(name, shape, dtype, load)

    def _made(self, name: str, shape: Sequence[int], dtype: torch.dtype, make: Callable[[], torch.Tensor]) -> ir.Value:
        """The initializer of this name, which `make` makes when the file is written."""
        if name in self.initializers:
            return self.initializers[name]

        def load() -> ir.TensorProtocol:
            return tensor_adapters.TorchTensor(make().contiguous(), name=name)

        return self._initializer(name, ir.LazyTensor(load, dtype=ONNX_DTYPE[dtype], shape=ir.Shape(shape), name=name))

    def view(
        self, value: ir.Value, suffix: str, shape: Sequence[int], dtype: ir.DataType | None = None
    ) -> ir.Value:
        """The bytes of an initializer under another shape; the file has them once (see `saving.write_model`).

        Args:
            suffix: its name is the other's with this behind.
            dtype: that they are read as; None: the other's.
        """
        name, source = f"{value.name}.{suffix}", value.const_value
        if name in self.initializers:
            return self.initializers[name]
        if source is None:
            raise TypeError(f"{value.name} is no initializer")

        def load() -> ir.TensorProtocol:
            return reread(source, dtype or source.dtype, shape, name)

        made = self._initializer(
            name, ir.LazyTensor(load, dtype=dtype or source.dtype, shape=ir.Shape(shape), name=name)
        )
        made.meta[VIEW_OF] = value.name
        return made

    def table(self, table: torch.Tensor) -> ir.Value:
        """A small tensor as a constant."""
        return self.constant(table.tolist(), table.dtype)

    def looked_up(self, codes: ir.Value, table: torch.Tensor) -> ir.Value:
        """table[code], which ONNX Runtime does once, when it loads the file."""
        return self.op("Gather", self.table(table), self.cast(codes, torch.int32))

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        return self.op("Cast", value, to=ONNX_DTYPE[dtype])

    def axes(self, dims: int | Sequence[int] | None) -> ir.Value | None:
        """Axes as an input; None, which is all of them, where there are none."""
        if dims is None or dims == []:
            return None
        return self.constant([dims] if isinstance(dims, int) else list(dims))

    def shape(self, sizes: Sequence[int | Node]) -> ir.Value:
        """A shape vector from ints and fx nodes of sizes."""
        if len(known := [s for s in sizes if isinstance(s, int)]) == len(sizes):
            return self.constant(known)
        parts = [self.constant([s]) if isinstance(s, int) else self._size(s) for s in sizes]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def _size(self, node: Node) -> ir.Value:
        """A size as a vector of one element."""
        if (size := Size.match(node)) is not None:
            axis = size.dim % len(shape_of(size.x))
            return self.op("Shape", self.get(size.x), start=axis, end=axis + 1)
        return self.op("Unsqueeze", self.get(node), self.constant([0]))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.initializers[name] = value
        return value

    def _unique(self, name: str) -> str:
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return name if count == 0 else f"{name}_{count}"


def reread(source: ir.TensorProtocol, dtype: ir.DataType, shape: Sequence[int], name: str) -> ir.TensorProtocol:
    """The bytes of a tensor, which is in memory, under another shape and as another type."""
    if dtype == source.dtype:
        return ir.tensor(source.numpy().reshape(shape), name=name)
    return ir.tensor(np.frombuffer(source.tobytes(), dtype.numpy()).reshape(shape), name=name)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of few bits in bytes as ONNX has them, the first in the lowest bits, over row-major data: uint8 [n]."""
    if bits == 4:
        return pack_int4(codes)
    return pack_rows(codes.reshape(-1).view(torch.uint8) & (1 << bits) - 1, bits)


def _as_spec(node: Node, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The tensor of a get_attr node in the dtype it has in the graph.

    Raises:
        NumericsError: that dtype, or the one that the graph casts it to, cannot hold it.
    """
    name = tensor_name(node)
    tensor = read(name)
    scale = name.endswith("_scale") and any(getattr(user.target, "namespace", "aten") != "aten" for user in node.users)
    for user in node.users:
        if is_call(user, torch.ops.aten.to.dtype):
            narrowed(tensor, dtype_of(user), name)
    return narrowed(tensor, dtype_of(node), name, scale=scale)


def name_of(made: ir.Value | ir.Node) -> str:
    """The name of a value or node of this graph, where all have one.

    Raises:
        TypeError: it has none.
    """
    if made.name is None:
        raise TypeError(f"{made} has no name")
    return made.name


def maker_of(value: ir.Value) -> ir.Node:
    """The node that makes a value.

    Raises:
        TypeError: none does.
    """
    if (node := value.producer()) is None:
        raise TypeError(f"no node makes {value}")
    return node


REMEDY = "Rewrite that part of the model, or add a translation in qexport/lower/ops"


def unsupported(node: Node, why: str) -> LoweringError:
    """The error for a call that has no ONNX form."""
    return LoweringError(f"{node.target} {why}{node.meta.get(Meta.LINE, '')}", place=place_of(node), remedy=REMEDY)


def place_of(node: Node) -> str:
    """The module whose code made a call, or the call's own name."""
    return node.meta.get(Meta.MODULE_PATH) or node.name
