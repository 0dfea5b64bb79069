"""The half of a weight format that knows graphs, and the registry that finds it by format, operator or kernel."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any, ClassVar, TypeVar

import torch
from torch.fx import Graph, GraphModule, Node

from ...errors import PassError
from ...graph.edit import add_tensor
from ...graph.meta import Meta
from ...quant.formats import QuantizedWeight, WeightFormat


class GraphForm(ABC):
    """How weights of a format stand in a graph: constants, and an operator that makes the weight [K, N] of them.

    Attributes:
        operator: makes the weight; None where another form has the same one.
        kernel: the ONNX operator that a product of float inputs and such a weight is in the optimized graph.
        kernel_operator: what lowering makes of the product and the operator, see `kernel_arguments`; None leaves them
            two, which is right where ONNX Runtime folds the weight when it loads the file, or fuses them itself.
        other_kernel_operators: the same, where it depends on the target, see `own_product`.
    """

    operator: ClassVar[Any] = None
    kernel: ClassVar[str] = "MatMul"
    kernel_operator: ClassVar[Any] = None
    other_kernel_operators: ClassVar[tuple[Any, ...]] = ()

    @abstractmethod
    def insert(
        self, module: GraphModule, name: str, weight: QuantizedWeight, factor: torch.Tensor | None = None
    ) -> Node:
        """Add the constants and the call of the operator where the graph inserts now; returns the call.

        Args:
            name: in front of the names of the constants; what ends in `_scale` is a scale to lowering.
            factor: [K], of the input features; only where the format folds columns.
        """

    def scales_in_sum(self, weight: Node) -> bool:
        """Whether scales differ between the input features of a product, so that it cannot be one of integers.

        Args:
            weight: a call of the operator, here and below.
        """
        return True

    def why_not_beside(self, weight: Node) -> str:
        """Why weights that differ in nothing but values and columns cannot stand side by side; empty where they can.

        They can where the output features are the last axis of every constant.
        """
        return "its weight has a form of its own"

    def input_block(self, weight: Node, whole: bool = False) -> int | None:
        """Features of the input that the CPU kernel rounds to 8 bits together, None for none, at accuracy level 4.

        Args:
            whole: the file has operators of ONNX alone, and `whole_block`s.
        """
        return None

    def why_not_standard(self, fmt: WeightFormat, opset: int) -> str:
        """What weights of a format need that the operators of ONNX lack up to an opset; empty where it has them all."""
        return ""

    def slow_with_float_inputs(self, fmt: WeightFormat) -> str:
        """What makes products slower than those of floats on the CPU where inputs stay float32; empty where nothing."""
        return ""

    def kernel_arguments(self, weight: Node) -> tuple[Any, ...] | None:
        """What `kernel_operator` takes behind the input of the product; None leaves this product as it is."""
        return None

    def own_product(self, x: Node, weight: Node, kernels: Collection[str]) -> tuple[Any, tuple[Any, ...]] | None:
        """The operator that becomes of a product, and its arguments; None leaves it as it is.

        Args:
            x: what the product reads.
            kernels: the ONNX operators that the target has for weights of few bits.
        """
        arguments = self.kernel_arguments(weight)
        return None if arguments is None else (self.kernel_operator, (x, *arguments))

    def kernel_at(self, product: Node) -> str:
        """The ONNX operator of a product that is one of the form's own."""
        return self.kernel


_F = TypeVar("_F", bound=type[GraphForm])
_BY_FORMAT: dict[type[WeightFormat], GraphForm] = {}
_BY_OPERATOR: dict[Any, GraphForm] = {}
_BY_KERNEL: dict[Any, GraphForm] = {}


def scale_tensor(graph: Graph, name: str, scale: torch.Tensor, fmt: WeightFormat) -> Node:
    """A tensor of a weight's scales, which says how the file is to keep them."""
    node = add_tensor(graph, f"{name}.weight_scale", scale)
    if fmt.has_coarse_scales:
        node.meta[Meta.COARSE] = True
    return node


def graph_form(fmt: type[Any]) -> Callable[[_F], _F]:
    """Register the form of a weight format, and of formats derived from it that have none of their own.

    Args:
        fmt: a class of `WeightFormat`, which may be abstract.

    Raises:
        ValueError: the format, the operator or the kernel has a form already.
    """

    def register(cls: _F) -> _F:
        form = cls()
        places: list[tuple[dict[Any, GraphForm], Any]] = [
            (_BY_FORMAT, fmt), (_BY_OPERATOR, cls.operator), (_BY_KERNEL, cls.kernel_operator),
            *((_BY_KERNEL, other) for other in cls.other_kernel_operators),
        ]  # fmt: skip
        for found, key in places:
            if key in found:
                raise ValueError(f"{key} has a form already: {type(found[key]).__name__}")
        for found, key in places:
            if key is not None:
                found[key] = form
        return cls

    return register


def form_for(fmt: WeightFormat) -> GraphForm:
    """The form of a format.

    Raises:
        PassError: it has none.
    """
    for cls in type(fmt).__mro__:
        if cls in _BY_FORMAT:
            return _BY_FORMAT[cls]
    raise PassError(f"{type(fmt).__name__} has no form in a graph", remedy="Register one, see passes/README.md")


def match_form(weight: Node) -> GraphForm | None:
    """The form whose operator a node calls; None where it calls none."""
    return _BY_OPERATOR.get(weight.target) if weight.op == "call_function" else None


def form_at(weight: Node) -> GraphForm:
    """The form whose operator a node calls.

    Raises:
        TypeError: it calls none.
    """
    if (form := match_form(weight)) is None:
        raise TypeError(f"{weight} is no weight of a format")
    return form


def form_at_kernel(product: Node) -> GraphForm:
    """The form whose kernel a node calls.

    Raises:
        TypeError: it calls none.
    """
    if product.op != "call_function" or product.target not in _BY_KERNEL:
        raise TypeError(f"{product} is no kernel of a format")
    return _BY_KERNEL[product.target]
