"""What lowering needs to know of a target. Targets stand above lowering: see `targets.base`."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.fx import GraphModule, Node

from .moe_form import MoeForm
from .operator_set import OperatorSet


class LoweringTarget(Protocol):
    """How blocks in canonical form become what a target runs; `targets.base.Target` says more of each."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what stays float: activations, cache, weights that are not quantized."""

    @property
    def operators(self) -> OperatorSet:
        """What its files are made of."""

    @property
    def prompts_in_floats(self) -> bool:
        """Whether attention over a cache of 8-bit integers is slow for many new tokens at once."""

    def why_dense(self, form: MoeForm) -> str:
        """Why a mixture of experts computes every one for every token; empty where it does not."""

    def prompt_twin(self, module: GraphModule) -> GraphModule | None:
        """What a canonical block is for prompts; None where that is nothing else."""

    def rewrite(self, module: GraphModule, constants: set[str]) -> None:
        """Turn canonical QDQ into what the target's kernels take, in place."""

    def kernel(self, product: Node) -> str:
        """The operator that the linear must have become in the optimized graph."""

    def slow(self, products: Sequence[Node]) -> dict[str, str]:
        """By name of a product, why its kernel is not the fastest; empty where it is."""

    def session(self, products: Sequence[Node] = ()) -> dict[str, str]:
        """Session entries that the numbers of the file depend on."""
