"""Where the quantized linears of a file are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from torch.fx import Graph, Node

from ..artifact.branches import STEPS
from ..artifact.manifest import QMOE, STATIC_LSTM
from ..graph.meta import BESIDE, Meta
from .emitter import maker_of, name_of
from .moe_form import mixtures
from .qdq_patterns import input_of, linear_products
from .recurrent_form import kernel_behind, static_layers


@dataclass(frozen=True)
class LinearLocation:
    """Where a quantized linear is.

    Attributes:
        node: name of its product; kernel: operator that it must become.
        input: value that it reads, before it is rounded.
        output: value of its result; columns: (start, stop) of the result in it, None where it is all of it.
            Input and output are empty of experts that are computed together, and of a recurrent layer's input that is
            one operator with it.
        prompt_kernel: the operator in the branch for prompts; None in a file without branches, and outside of them.
        slow: why another kernel of the same operator would be faster than its; empty where none would, None where the
            operator has one.
        orders: of the features that it reads and of those that it makes, see `artifact.feature_order`.
    """

    node: str
    kernel: str
    input: str
    output: str
    columns: tuple[int, int] | None
    prompt_kernel: str | None = None
    slow: str | None = None
    orders: tuple[str, str] = ("", "")


class KernelMap:
    """Where the linears of a file are: what is noted while its blocks are translated.

    Args:
        kernel: the operator that a product must become.

    Attributes:
        members: by the name of a product, its linears and their columns.
    """

    def __init__(self, kernel: Callable[[Node], str]):
        self.members: dict[str, Mapping[str, tuple[int, int] | None]] = {}
        self._kernel = kernel
        self._products: dict[str, tuple[str, str]] = {}
        self._prompt_kernels: dict[str, str] = {}
        self._made: dict[str, ir.Value] = {}
        self._read: dict[str, ir.Value] = {}
        self._parts: dict[str, tuple[tuple[str, str], ...]] = {}
        self._inside: dict[str, tuple[str, str]] = {}
        self._orders: dict[str, tuple[str, str]] = {}

    def note(
        self,
        graph: Graph,
        values: Mapping[Node, ir.Value],
        made: Mapping[str, ir.Value],
        results: Mapping[Node, tuple[ir.Value, ...]],
    ) -> None:
        """After a block was translated: its products, and the results of its linears.

        Args:
            values, results: of the nodes of its graph that have one, or several.
            made: by the name of the linear.
        """
        self._made |= made
        for node in graph.nodes:
            self._orders |= node.meta.get(Meta.ORDERS, {})
        whole = static_layers(graph)
        for product, steps in whole.items():
            name = product.meta[Meta.LINEAR]
            self._inside[name] = plain(name_of(kernel_behind(results[steps][0]))), STATIC_LSTM
            self.members[name] = {name: None}
        for product in linear_products(graph):
            if product in whole:
                continue
            found = (plain(name_of(maker_of(values[product]))), self._kernel(product))
            owner = product.meta.get(Meta.PLANE_OF) or product.meta.get(Meta.BRANCH_OF)
            if owner:
                self._parts[owner] = (*self._parts.get(owner, ()), found)
            else:
                name = product.meta[Meta.LINEAR]
                self._products[name], self.members[name] = found, product.meta.get(Meta.COLUMNS) or {name: None}
                self._read[name] = values[input_of(product)]
        for mixture in mixtures(graph):
            experts, node = mixture.meta[Meta.EXPERTS], plain(name_of(maker_of(values[mixture])))
            for side in ("up", "down"):
                names = getattr(experts, side)
                self._inside |= dict.fromkeys(names, (node, QMOE))
                self.members[f"{experts.name}.{side}"] = {name: (e, e + 1) for e, name in enumerate(names)}

    def note_prompts(self, graph: Graph) -> None:
        """After the same block was translated for prompts; its linears are where they are for steps."""
        for product in linear_products(graph):
            if not BESIDE & set(product.meta):
                self._prompt_kernels[product.meta[Meta.LINEAR]] = self._kernel(product)
        for mixture in mixtures(graph):
            experts = mixture.meta[Meta.EXPERTS]
            self._prompt_kernels |= dict.fromkeys((*experts.up, *experts.down), QMOE)

    def placed(self, slow: Mapping[str, str]) -> dict[str, LinearLocation]:
        """Where every quantized linear is, once the outputs of the model have their names: values may go by those.

        Args:
            slow: by the name of a product, see `LinearLocation`.
        """
        inside = {
            name: LinearLocation(node, kernel, "", "", None, self._prompt_kernels.get(name))
            for name, (node, kernel) in self._inside.items()
        }
        return inside | {
            linear: LinearLocation(
                node,
                kernel,
                plain(name_of(self._read[name])),
                plain(name_of(self._made[name])),
                columns,
                self._prompt_kernels.get(name),
                slow.get(name),
                self._orders.get(linear, ("", "")),
            )  # fmt: skip
            for name, (node, kernel) in self._products.items()
            for linear, columns in self.members[name].items()
        }

    def parts(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """See `Lowered.parts`."""
        return {
            linear: found
            for name, linears in self.members.items()
            for linear in linears
            if (found := tuple(dict.fromkeys(self._parts.get(name, ()) + self._parts.get(linear, ()))))
        }


def plain(name: str) -> str:
    """The name that a node or value of the branch for steps has in a file without branches."""
    return name.removeprefix(STEPS)
