"""Rotations within blocks: of values, of queries and keys, and of what linears behind an activation read.

QuaRot's R2, R3 and R4 (arXiv 2404.00456). With an orthogonal R, attention's weighted sum of values v R is the sum of v
times R, so that R folds into the projections on both sides. Scores of q R and k R are those of q and k, but between R
and the projections stands the rotary embedding, so that R is a product when the model runs. The same holds for what a
gate has multiplied: x R with a weight whose columns are turned alike. There R is the Kronecker product of two small
matrices.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from ...capture.blocks import Block
from ...capture.graph import CapturedModel
from ...errors import PassError
from ...graph.edit import add_tensor, call, is_call, shape_of
from ...graph.schema import rebind
from ...graph.sites import FoldSite, fold_sites, linear_at
from ...graph.views import CachedAttention, Norm, size_at
from ...quant.hadamard import factored_rotation, rotation
from ..base import SiteRecord
from .base import Make, ModelPass, ModelResult, Read, change_weights

aten = torch.ops.aten
_ACTIVATIONS = (
    aten.mul.Tensor, aten.gelu.default, aten.silu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default,
    aten.square.default, aten.pow.Tensor_Scalar, aten.leaky_relu.default, aten.elu.default,
)  # fmt: skip


@dataclass(frozen=True)
class RotateValues(ModelPass):
    """Turn the values of every key-value head by a matrix of its own, folded into both projections (R2).

    Attributes:
        seed: of the signs.
    """

    seed: int = 0

    def call(self, captured: CapturedModel) -> ModelResult:
        result = ModelResult()
        made: dict[str, Make] = {}
        for site in (site for block in captured.blocks for site in fold_sites(block.module.graph)):
            if site.repeat is None or site.producer is None or (linear := linear_at(site.producer)) is None:
                continue
            kv_heads, queries, size = site.repeat
            turns = torch.stack([rotation(size, self.seed + head) for head in range(kv_heads)])
            made |= {name: partial(_rows, name, turns) for name in (linear.weight, linear.bias) if name is not None}
            read = turns.repeat_interleave(queries, 0)
            made |= {consumer.weight: partial(_columns_by_head, consumer.weight, read) for consumer in site.consumers}
            result.changed.append(SiteRecord(linear.name, "values turned", {"heads": kv_heads, "size": size}))
        if not made:
            raise PassError("no attention has its values straight from a linear of their own, as `values` needs")
        change_weights(captured, made)
        return result


@dataclass(frozen=True)
class RotateKeys(ModelPass):
    """Turn queries and keys behind their rotary embedding, with one matrix for all heads (R3).

    Attributes:
        seed: of the signs.
    """

    seed: int = 0

    def call(self, captured: CapturedModel) -> ModelResult:
        result = ModelResult()
        for block in captured.blocks:
            graph = block.module.graph
            for node in list(graph.nodes):
                if (attention := CachedAttention.match(node)) is None:
                    continue
                size = size_at(attention.key, -1)
                with graph.inserting_before(node):
                    turn = _constant(captured, block, f"rotation.keys_{size}", rotation(size, self.seed))
                    query, key = (
                        call(graph, aten.matmul.default, (value, turn), like=value)
                        for value in (attention.query, attention.key)
                    )
                rebind(node, query=query, key=key)
                result.changed.append(SiteRecord(f"{block.name}.{node.name}", "queries and keys turned"))
            block.module.recompile()
        if not result.changed:
            raise PassError("the model has no attention over a cache")
        return result


@dataclass(frozen=True)
class RotateInputs(ModelPass):
    """Turn what linears read that neither a norm nor attention makes, when the model runs (R4).

    Attributes:
        seed: of the signs.
    """

    seed: int = 0

    def call(self, captured: CapturedModel) -> ModelResult:
        result = ModelResult()
        made: dict[str, Make] = {}
        for block in captured.blocks:
            for site in fold_sites(block.module.graph):
                names = ", ".join(linear.name for linear in site.consumers)
                if why := _why_not(site):
                    result.skipped.append(SiteRecord(names, why))
                    continue
                first, second = factored_rotation(size_at(site.value, -1), self.seed)
                self._insert(captured, block, site, first, second)
                made |= {n.weight: partial(_columns, n.weight, first, second) for n in site.consumers}
                what = f"inputs turned by {len(first)} x {len(second)}"
                result.changed.append(SiteRecord(names, what))
            block.module.recompile()
        change_weights(captured, made)
        return result

    def _insert(self, captured: CapturedModel, block: Block, site: FoldSite, first: Tensor, second: Tensor) -> None:
        """Rows as matrices [a, b] between both factors, and back, in front of the linears."""
        graph, value, (a, b) = block.module.graph, site.value, (len(first), len(second))
        rows = shape_of(value)[:-1]
        with graph.inserting_before(value.next):
            left = _constant(captured, block, f"rotation.inputs_left_{a}", first.t().contiguous())
            right = _constant(captured, block, f"rotation.inputs_right_{b}", second)
            apart = call(graph, aten.unflatten.int, (value, -1, [a, b]), like=value, shape=(*rows, a, b))
            half = call(graph, aten.matmul.default, (apart, right), like=apart)
            whole = call(graph, aten.matmul.default, (left, half), like=apart)
            turned = call(graph, aten.flatten.using_ints, (whole, -2, -1), like=value)
        for linear in site.consumers:
            reader = linear.node if linear.input is value else linear.input
            reader.replace_input_with(value, turned)


def _why_not(site: FoldSite) -> str:
    value = site.value
    if value.op == "placeholder" or is_call(value, *Norm.targets):
        return "turned with the residual stream"
    if site.repeat is not None or site.kind != "rows" and not is_call(value, *_ACTIVATIONS):
        return f"{value.name} comes from no activation"
    if not site.scalable:
        return site.why
    read = {consumer.node for consumer in site.consumers} | {consumer.input for consumer in site.consumers}
    others = [user.name for user in value.users if user not in read and not is_call(user, aten.sym_size.int)]
    return f"{value.name} is also read by {others[0]}" if others else ""


def _constant(captured: CapturedModel, block: Block, name: str, value: Tensor) -> Node:
    """A tensor of the graph that is one for all blocks."""
    captured.constants[name] = value.float()
    if name not in block.parameters:
        block.parameters.append(name)
    return add_tensor(block.module.graph, name, captured.constants[name].to("meta"))


def _rows(name: str, turns: Tensor, read: Read) -> Tensor:
    """The weight [heads size, K], or the bias, of a linear whose results are turned head by head."""
    plain = read(name).double()
    parts = plain.view(len(turns), turns.shape[1], -1)
    return (turns.transpose(1, 2) @ parts).reshape(plain.shape).float()


def _columns_by_head(name: str, turns: Tensor, read: Read) -> Tensor:
    """The weight [N, heads size] of a linear that reads rows turned head by head."""
    plain = read(name).double()
    parts = plain.view(len(plain), *turns.shape[:2])
    return torch.einsum("nhi,hij->nhj", parts, turns).reshape(plain.shape).float()


def _columns(name: str, first: Tensor, second: Tensor, read: Read) -> Tensor:
    """The weight [N, a b] of a linear that reads rows turned by the product of two factors."""
    plain = read(name).double()
    parts = plain.view(len(plain), len(first), len(second))
    return torch.einsum("nij,ik,jl->nkl", parts, first, second).reshape(plain.shape).float()
