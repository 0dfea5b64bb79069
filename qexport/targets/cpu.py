"""The CPU provider of ONNX Runtime: float32, uint8 activations, MatMulNBits for weights in groups."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch.fx import GraphModule, Node

from ..artifact.manifest import CPU
from ..graph.edit import add_tensor, call, finish, is_call
from ..graph.meta import Meta
from ..graph.schema import bind, rebind
from ..graph.views import DequantizeLinear, Matmul, QuantizeLinear
from ..lower import moe_form
from ..lower.prefill_twin import LONGEST_STEP, prompt_twin
from ..lower.qdq_patterns import (
    Rounding,
    as_own_kernel,
    as_standard_operators,
    form_of,
    kernel_of,
    linear_products,
)
from ..passes.formats import form_at, form_for
from ..passes.formats.integer import rounds_inputs
from ..plan.linear_plan import LinearPlan
from ..quant.packing import DEFAULT_BLOCK
from .base import Target, register
from .kernels import qmoe
from .kernels.convolutions import slower_than_float
from .kernels.linears import slow_integers

ops = torch.ops.qexport
aten = torch.ops.aten


@register
@dataclass(frozen=True)
class CpuTarget(Target):
    """How a quantized graph is written for the CPU.

    Attributes:
        accuracy_level: 4 lets MatMulNBits round its float input to 8 bits in blocks (fast); 1 keeps it float32.
        prefill: "int8": prompts go through int8 products (see lower/prefill_twin.py).
    """

    name: ClassVar[str] = "cpu"
    provider: ClassVar[str] = CPU
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    candidates: ClassVar[tuple[str, ...]] = (
        "w2a16_g64_asym_s8", "w2a16_g32_asym_s8", "w3a16_g64_s8", "w3a16_g32_s8", "w3a16_g16_s8", "w3a16_g32_asym_s8",
        "w4a16_g128_s8", "w4a16_g64_s8", "w4a16_g32_s8", "w4a16_g16_s8", "w4a16_g128_asym_s8", "w4a16_g64_asym_s8",
        "w4a16_g32_asym_s8", "w4a16_g16_asym_s8", "w5a16_g64_s8", "w5a16_g32_s8", "w5a16_g16_s8", "w6a16_g64_s8",
        "w6a16_g32_s8", "w6a16_g16_s8", "w8a16_g128", "w8a16_g64", "w8a16_g32",
    )  # fmt: skip
    prompts_in_floats: ClassVar[bool] = True
    # Of one row a step of 128 states takes 8 us as a Scan over codes and 5 us in the LSTM of floats, one of 256 takes
    # 17 and 19, one of 1024 takes 280 and 910 (one thread of an AVX512-VNNI machine).
    least_recurrent: ClassVar[int | None] = 256
    genai_provider_options: ClassVar[tuple[dict[str, dict[str, str]], ...] | None] = ()
    dtype: torch.dtype = dtypes[0]
    accuracy_level: int = 4
    prefill: str | None = None

    @classmethod
    def exact(cls, dtype: torch.dtype) -> Self:
        """Accuracy level 1, which keeps float inputs as they are."""
        return cls(dtype=dtype, accuracy_level=1)

    def no_convolution(self, shape: Sequence[int], groups: int) -> str:
        """Where it is slower than float; in a file of standard operators, which others read, all have one."""
        return slower_than_float(shape, groups) if self.operators.contrib else ""

    def session(self, products: Sequence[Node] = ()) -> dict[str, str]:
        """Session entries without which the file computes something else."""
        return {
            "session.qdq_matmulnbits_accuracy_level": str(self.accuracy_level),
            "session.qdq_matmulnbits_block_size": str(DEFAULT_BLOCK),
            # It makes a Gemm of a product of 2-D activations and its bias, and the integer fusion passes Gemm by.
            "optimization.disable_specified_optimizers": "MatMulAddFusion",
        }

    def slower_than_float(self, plan: Sequence[LinearPlan]) -> str:
        """At accuracy level 1 all but 4-bit integers, by a factor of 4 and more (samples/linear_speed.py)."""
        said = (self._slow_groups(plan), slow_integers(plan))
        return "; ".join(sentence for sentence in said if sentence)

    def _slow_groups(self, plan: Sequence[LinearPlan]) -> str:
        if self.accuracy_level == 4:
            return ""
        schemes = [p.scheme for p in plan if p.scheme is not None and not p.scheme.integer]
        slow = [why for s in schemes if (why := form_for(s.weight).slow_with_float_inputs(s.weight))]
        if not slow:
            return ""
        return (
            f"{len(slow)} of {len(plan)} linears are slower than in float32: the CPU has no fast kernel for "
            f"{' and '.join(sorted(set(slow)))} with float inputs; accuracy_level 4, which rounds inputs to 8 bits, has"
        )

    def numerics(self, kv_cache_bits: int | None = None) -> dict[str, str]:
        """What a user should know about the arithmetic."""
        tables = "values of nf4 and fp4 are exact (MatMulBnb4), which is slower than float32"
        if self.accuracy_level == 4:
            tables = "values of nf4 and fp4 are rounded to 8 bits, steps of 1/127 of the largest of a block"
            inputs = (
                "float inputs of MatMulNBits and QMoE are rounded to 8 bits per row and block (accuracy level 4), "
                "except with 2-bit weights in groups of 16, for which ONNX Runtime has no such kernel"
            )
        else:
            inputs = "float inputs of MatMulNBits and QMoE stay float32 (accuracy level 1)"
        said = {
            "weight_only": inputs, "tables": tables, "integer": "8-bit inputs are unsigned with zero point 128",
            "dtype": "float32",
        }  # fmt: skip
        if self.prefill == "int8":
            said["prefill"] = (
                f"calls with more than {LONGEST_STEP} new tokens round the inputs of weights in groups to 8 bits per "
                "token, and these weights to int8 per output channel"
            )
        return said

    def prompt_twin(self, module: GraphModule) -> GraphModule | None:
        """What a canonical block is for prompts; None where that is nothing else."""
        return prompt_twin(module) if self.prefill == "int8" else None

    def why_dense(self, form: moe_form.MoeForm) -> str:
        """Why a mixture of experts computes every one for every token; empty where it does not."""
        return qmoe.why_dense_on_cpu(form, self.accuracy_level)

    def rewrite(self, module: GraphModule, constants: set[str]) -> None:
        """Turn canonical QDQ into the forms that this provider fuses, in place."""
        for product in linear_products(module.graph):
            if (rounding := form_of(product).integer) is not None:
                _integer(module, product, rounding)
                continue
            canonical = Matmul.of(product)
            x, whole = canonical.x, not self.operators.contrib
            block = form_at(canonical.weight).input_block(canonical.weight, whole)
            if self.accuracy_level == 4 and block is not None:
                with module.graph.inserting_before(product):
                    rounded = call(module.graph, ops.matmul_nbits_input.default, (x, block), like=x)
                product.replace_input_with(x, rounded)
            if self.operators.contrib:
                as_own_kernel(module, product, self._kernels)
            else:
                as_standard_operators(module, product)
        if self.accuracy_level == 4:
            for mixture in moe_form.mixtures(module.graph):
                rebind(mixture, rounds=True)
            for node in module.graph.nodes:
                if is_call(node, ops.recurrent_steps_nbits.default):
                    given = bind(node)
                    rebind(node, rounds=rounds_inputs(given.bits, given.block_size))
        finish(module)

    @property
    def _kernels(self) -> frozenset[str]:
        """MatMulBnb4 is slower than float on this provider: only where inputs stay as they are, it is nearest."""
        return self.weight_kernels - ({"MatMulBnb4"} if self.accuracy_level == 4 else set())

    def kernel(self, product: Node) -> str:
        """The operator that the linear must have become in the optimized graph."""
        canonical = Matmul.match(product) is not None
        return "MatMulIntegerToFloat" if canonical and form_of(product).integer else kernel_of(product)


def _integer(module: GraphModule, product: Node, rounding: Rounding) -> None:
    """uint8 activations with zero point 128; the token scale behind the product; 4-bit codes widened when loaded."""
    graph = module.graph
    codes, token_scale, canonical = rounding.quantize, rounding.token_scale, Matmul.of(product)
    if QuantizeLinear.of(codes).signed:  # still signed: not yet rewritten for another linear that shares it
        with graph.inserting_before(codes):
            name = f"{product.meta[Meta.LINEAR]}.input_zero_point"
            zero = add_tensor(graph, name, torch.tensor(128, dtype=torch.uint8))
        rebind(codes, zero_point=128, signed=False)
        codes.meta[Meta.SPEC] = replace(codes.meta[Meta.SPEC], dtype=torch.uint8)
        rebind(rounding.dequantize, zero_point=zero)
    if token_scale is not None:
        product.replace_input_with(canonical.x, rounding.dequantize)
        with graph.inserting_after(product):
            scaled = call(graph, aten.mul.Tensor, (product, token_scale), like=product)
        product.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        if Meta.RESULT_OF in product.meta:
            scaled.meta[Meta.RESULT_OF] = product.meta.pop(Meta.RESULT_OF)
    weight = DequantizeLinear.of(canonical.weight)
    if weight.bits == 4 and not is_call(weight.codes, ops.widen_int4.default):
        with graph.inserting_before(canonical.weight):
            wide = call(graph, ops.widen_int4.default, (weight.codes,), like=weight.codes)
        rebind(canonical.weight, codes=wide, bits=8)
