"""The CUDA provider of ONNX Runtime: float16 (or bfloat16), int8 activations through MatMulInteger, MatMulNBits."""

import ctypes
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from ..artifact.manifest import CUDA
from ..graph.edit import call, finish, is_call, shape_of
from ..graph.meta import Meta
from ..graph.schema import bind, rebind
from ..graph.views import DequantizeLinear, ExpertShares, Matmul, QuantizeLinear, sizes_of
from ..lower import moe_form
from ..lower.precision import to_half
from ..lower.qdq_patterns import (
    Rounding,
    as_own_kernel,
    as_standard_operators,
    form_of,
    kernel_of,
    linear_products,
)
from ..lower.routing_weights import sum_of
from ..lower.scan_as_attention import scans_as_attention
from ..plan.linear_plan import LinearPlan
from ..quant.formats import Scheme
from ..quant.packing import DEFAULT_BLOCK
from ..recipe.recipe import Recipe
from .base import Target, register
from .kernels import fpa_intb, qmoe
from .kernels.bfloat16 import lacks_bfloat16
from .kernels.predict_kernels import slow_linears

# MatMulInteger with fewer input features fails on an H200 for 17 rows and more that are no multiple of 4: cuBLAS has no
# such product (samples/gpu_integer.py).
_FEWEST = 128
ops = torch.ops.qexport
aten = torch.ops.aten


@register
@dataclass(frozen=True)
class CudaTarget(Target):
    """How a quantized graph is written for CUDA.

    Attributes:
        dtype: float16, or bfloat16 for the schemes that `kernels.bfloat16` lets pass.
    """

    name: ClassVar[str] = "cuda"
    provider: ClassVar[str] = CUDA
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    # Zero points and groups of 16 keep a linear from the fast kernels.
    candidates: ClassVar[tuple[str, ...]] = ("w4a16_g128", "w4a16_g64", "w4a16_g32", "w8a16_g128", "w8a16_g32")
    weight_kernels: ClassVar[frozenset[str]] = Target.weight_kernels | {
        "MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight",
    }  # fmt: skip
    e4m3_cache: ClassVar[bool] = True
    codes_beside_bias: ClassVar[bool] = False  # "attention_bias with quantized KV cache is not implemented", 1.31
    genai_provider_options: ClassVar[tuple[dict[str, dict[str, str]], ...] | None] = ({"cuda": {}},)
    dtype: torch.dtype = dtypes[0]

    def lacks(self, scheme: Scheme, recipe: Recipe) -> tuple[str, str]:
        """Nothing in float16; see `kernels.bfloat16`."""
        if self.dtype != torch.bfloat16:
            return "", ""
        return lacks_bfloat16(scheme, [method.ungrouped for method in recipe.methods if method.ungrouped])

    def why_not_run(self) -> str:
        """Asked before ONNX Runtime is, which writes a line of its own where there is no driver."""
        return "" if _has_driver() else "no NVIDIA driver on this machine"

    def session(self, products: Sequence[Node] = ()) -> dict[str, str]:
        """Session entries without which the file runs otherwise than planned, or not at all.

        Args:
            products: of the whole file, rewritten.
        """
        return {
            fpa_intb.ENTRY: "0",
            # A bias folded into MatMulNBits rules out fpA_intB for who turns it on; and the transformer would copy a
            # static quantization to the other side of every transpose and reshape before it, without taking it away.
            "optimization.disable_specified_optimizers": "MatMulAddFusion;MatMulNBitsFusion;QDQPropagationTransformer",
            "session.qdq_matmulnbits_block_size": str(DEFAULT_BLOCK),
            # CUDA does not read it; the CPU provider, when it runs the file, would round float inputs to 8 bits.
            "session.qdq_matmulnbits_accuracy_level": "1",
        }

    def numerics(self, kv_cache_bits: int | None = None) -> dict[str, str]:
        """What a user should know about the arithmetic."""
        name = str(self.dtype).removeprefix("torch.")
        found = {
            "dtype": f"{name}; position tables and the scaling of integer products are float32",
            "integer": "8-bit inputs are signed with zero point 0",
        }
        if kv_cache_bits is not None:
            found["cache"] = (
                "attention on CUDA differs from the graph by more than rounding, and is as near to the float model: "
                "it seems to read a prompt's own keys and values before they become codes"
            )
        return found

    def slow(self, products: Sequence[Node]) -> dict[str, str]:
        """For every MatMulNBits of a file, by name, why fpA_intB does not take it; empty where it does."""
        return fpa_intb.why_slow(_nbits(products))

    def predict_slow(self, graphs: Sequence[Graph], plan: Mapping[str, LinearPlan]) -> dict[str, str]:
        """The same, told from shapes."""
        return slow_linears(graphs, plan)

    def why_dense(self, form: moe_form.MoeForm) -> str:
        """Why a mixture of experts computes every one for every token; empty where it does not."""
        return qmoe.why_dense_on_cuda(form)

    def rewrite(self, module: GraphModule, constants: set[str]) -> None:
        """Turn canonical QDQ into nodes that have CUDA kernels, and the graph into `dtype`, in place."""
        for product in linear_products(module.graph):
            if not self.operators.contrib:
                as_standard_operators(module, product)
            elif (rounding := form_of(product).integer) is not None:
                _integer(module, product, rounding)
            else:
                as_own_kernel(module, product, self.weight_kernels)
        if self.operators.contrib:
            scans_as_attention(module.graph)
        for mixture in moe_form.mixtures(module.graph):
            _by_scores(module.graph, mixture)
        for node in module.graph.nodes:
            if is_call(node, ops.expand_codes.default):
                node.meta[Meta.KEEP_FLOAT32] = True  # what is expanded is expanded once and in float32
        finish(module)
        to_half(module, constants, self.dtype)

    def kernel(self, product: Node) -> str:
        """The operator that the linear must have become in the optimized graph."""
        if is_call(product, ops.matmul_integer.default):
            return "MatMulInteger"
        canonical = Matmul.match(product)
        if canonical is not None and DequantizeLinear.match(canonical.x) is not None:
            return "MatMul"  # of a weight that is dequantized at every call
        return kernel_of(product)


def _by_scores(graph: Graph, mixture: Node) -> None:
    """Shares as the softmax of scores, times their sum: this provider does not read them from an input of their own."""
    given = bind(mixture)
    x, shares = given.x, given.scores
    total: Node | float | None = sum_of(ExpertShares.of(shares).weights)
    with graph.inserting_before(mixture):
        scores = shares
        # In float32, where no share becomes zero but those that are.
        for target, *more in ((aten.to.dtype, torch.float32), (aten.clamp_min.default, 1e-30), (aten.log.default,)):
            scores = call(graph, target, (scores, *more), like=shares)
            scores.meta[Meta.KEEP_FLOAT32] = True
        if total is None:
            total = call(graph, aten.sum.dim_IntList, (shares, [-1], True), like=shares, shape=(shape_of(shares)[0], 1))
            sizes = [call(graph, aten.sym_size.int, (x, axis), like=x, dtype=torch.int64, shape=()) for axis in (0, 1)]
            total = call(graph, aten.view.default, (total, [*sizes, 1]), like=x, shape=(*shape_of(x)[:-1], 1))
    rebind(mixture, scores=scores, shares=None)
    if total == 1:
        return
    with graph.inserting_after(mixture):
        scaled = call(graph, aten.mul.Tensor, (mixture, total), like=mixture)
    mixture.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _has_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _nbits(products: Sequence[Node]) -> dict[str, fpa_intb.Product]:
    found = {product.meta[Meta.LINEAR]: fpa_intb.product_of(product) for product in products}
    return {name: product for name, product in found.items() if product is not None}


def _widen(graph: Graph, quantize: Node, more: int) -> None:
    """Give a quantization as many zeros behind its features, once for all products that read it."""
    x = QuantizeLinear.of(quantize).x
    if Meta.PADDED in x.meta:
        return
    wide = (*shape_of(x)[:-1], _FEWEST)
    with graph.inserting_before(quantize):
        padded = call(graph, aten.constant_pad_nd.default, (x, [0, more]), like=x, shape=wide)
    padded.meta[Meta.PADDED] = True
    rebind(quantize, x=padded)
    quantize.meta[Meta.SPEC] = replace(quantize.meta[Meta.SPEC], shape=wide)


def _integer(module: GraphModule, product: Node, rounding: Rounding) -> None:
    """codes x codes in int32, then the scales in float32: the sums do not fit float16."""
    graph, weight = module.graph, DequantizeLinear.of(Matmul.of(product).weight)
    codes, step = weight.codes, rounding.token_scale
    with graph.inserting_before(product):
        if weight.bits == 4:
            codes = call(graph, ops.widen_int4.default, (codes,), like=codes)
        wide, (rows, columns) = codes, sizes_of(codes)
        if rows < _FEWEST:
            pads = [0, 0, 0, _FEWEST - rows]
            wide = call(graph, aten.constant_pad_nd.default, (codes, pads), like=codes, shape=(_FEWEST, columns))
            _widen(graph, rounding.quantize, _FEWEST - rows)
        exact = call(graph, ops.matmul_integer.default, (rounding.quantize, wide), like=product, dtype=torch.int32)
        result = call(graph, aten.to.dtype, (exact, torch.float32), like=product)
        result.meta[Meta.KEEP_FLOAT32] = True
        for factor in (QuantizeLinear.of(rounding.quantize).scale if step is None else step, weight.scale):
            result = call(graph, aten.mul.Tensor, (result, factor), like=product)
            result.meta[Meta.KEEP_FLOAT32] = True
    exact.meta.update({key: product.meta[key] for key in ("linear", "plane_of", "columns") if key in product.meta})
    if Meta.RESULT_OF in product.meta:
        result.meta[Meta.RESULT_OF] = product.meta[Meta.RESULT_OF]
    product.replace_all_uses_with(result)
    graph.erase_node(product)
