"""What a target is, and all there are by name.

A target is one class in one module: it derives from `Target`, declares what it is in class attributes, and registers:

    @register
    @dataclass(frozen=True)
    class CpuTarget(Target):
        name: ClassVar[str] = "cpu"
        ...

Every module of this folder but this one holds a target of the same name, and is imported when a target is first looked
up. A target outside of the package registers when its module is imported; then `export(..., target=NAME)` finds it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import import_module
from typing import ClassVar, Self, TypeVar

import torch
from torch.fx import Graph, GraphModule, Node

from ..errors import InputError, RecipeError
from ..lower.moe_form import MoeForm
from ..lower.operator_set import NATIVE, OperatorSet
from ..lower.qdq_patterns import WEIGHT_KERNELS
from ..passes.formats import form_for
from ..plan.linear_plan import LinearPlan
from ..quant.formats import Scheme
from ..recipe.recipe import Recipe
from . import BUILT_IN

# Keys of a recipe that a target either can follow or must refuse. Others that a target does not know change nothing
# about its files.
_REFUSED = ("prefill",)


@dataclass(frozen=True)
class Target(ABC):
    """How a quantized graph is written for an execution provider of ONNX Runtime.

    Fields of a subclass go by keys of a recipe, which set them.

    Attributes:
        name: what `export(target=...)`, the command line and manifests call it.
        provider: ONNX Runtime's name of the execution provider that runs its files.
        dtypes: what can stay float: activations, cache, weights that are not quantized. The first is taken unasked.
        candidates: schemes that mixed precision chooses from, weights in groups, from the smallest to the closest.
        weight_kernels: ONNX operators that it has for products with weights of few bits.
        e4m3_cache: whether attention keeps a cache of E4M3 numbers; else they are rounded, and kept as floats.
        prompts_in_floats: whether attention over a cache of integers is slow for many new tokens at once, so that
            it is one over floats there (see lower/prompt_attention.py).
        codes_beside_bias: whether attention that adds a bias to scores (ALiBi) can keep a cache of codes.
        least_recurrent: the fewest states of a recurrent layer whose steps run faster with codes than in float; None
            where they have no kernel.
        genai_provider_options: of onnxruntime-genai; None where it is not configured for this target.
        dtype: one of `dtypes`.
        operators: what files are made of.
    """

    dtype: torch.dtype
    operators: OperatorSet = field(default=NATIVE, kw_only=True)
    name: ClassVar[str]
    provider: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    candidates: ClassVar[tuple[str, ...]]
    weight_kernels: ClassVar[frozenset[str]] = WEIGHT_KERNELS
    e4m3_cache: ClassVar[bool] = False
    prompts_in_floats: ClassVar[bool] = False
    codes_beside_bias: ClassVar[bool] = True
    least_recurrent: ClassVar[int | None] = None
    genai_provider_options: ClassVar[tuple[dict[str, dict[str, str]], ...] | None] = None

    @classmethod
    def from_recipe(cls, recipe: Recipe, dtype: torch.dtype) -> Self:
        """The target as a recipe wants it.

        Raises:
            RecipeError: the recipe asks for a form that the target does not have.
        """
        options = cls.options()
        for key in _REFUSED:
            if getattr(recipe, key) is not None and key not in options:
                able = " and ".join(name for name, other in targets().items() if key in other.options())
                raise RecipeError(
                    f"{key}: {getattr(recipe, key)} is not supported by the target {cls.name}", place=key,
                    remedy=f"Remove it; {able} supports it" if able else "Remove it",
                )  # fmt: skip
        return cls(dtype=dtype, **{key: getattr(recipe, key) for key in options})

    @classmethod
    def exact(cls, dtype: torch.dtype) -> Self:
        """The target that adds no roundings of its own, for a file of the float model."""
        return cls(dtype=dtype)

    @property
    def least_states(self) -> int | None:
        """`least_recurrent`, of these operators."""
        return self.least_recurrent if self.operators.contrib else None

    def no_convolution(self, shape: Sequence[int], groups: int) -> str:
        """Why a convolution of int8 inputs and weights stays in float; empty where it has a kernel worth taking.

        Args:
            shape: of the weight, [outputs, inputs of a group, kernel ...].
        """
        return "this target has no integer convolution"

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The keys of a recipe that it takes."""
        return tuple(f.name for f in fields(cls) if f.name not in ("dtype", "operators"))

    def check(self, plan: Sequence[LinearPlan], recipe: Recipe) -> None:
        """Refuse what has no kernel, before a weight is read.

        Args:
            plan: the decision for every linear.

        Raises:
            InputError: names the first linear and what it lacks.
        """
        for linear in plan:
            if linear.scheme is None:
                continue
            why, remedy = self._lacks_words(linear.scheme) if not self.operators.contrib else ("", "")
            why, remedy = (why, remedy) if why else self.lacks(linear.scheme, recipe)
            if why:
                raise InputError(f"{linear.scheme.name} has {why}", place=linear.name, remedy=remedy)

    def _lacks_words(self, scheme: Scheme) -> tuple[str, str]:
        """What the operators of ONNX do not say of a scheme, and what to do; empty where they say it."""
        why = form_for(scheme.weight).why_not_standard(scheme.weight, self.operators.opset)
        return why, "Use form native, or a scheme such as w4a16_g32"

    def lacks(self, scheme: Scheme, recipe: Recipe) -> tuple[str, str]:
        """The kernel that a quantized linear would need and that is missing, and what to do; empty where none is.

        Returns:
            such as ("no bfloat16 kernel: inputs are quantized", "Use dtype float16").
        """
        return "", ""

    def predict_slow(self, graphs: Sequence[Graph], plan: Mapping[str, LinearPlan]) -> dict[str, str]:
        """What `slow` will say of a file, told from shapes: by name, the linears that have several kernels.

        Args:
            graphs: of all blocks; plan: by linear name.
        """
        return {}

    def slower_than_float(self, plan: Sequence[LinearPlan]) -> str:
        """Which of the linears run slower than in float, and what to do; empty where none does."""
        return ""

    def why_not_run(self) -> str:
        """Why a finished file is not tried on this machine; empty where it is."""
        return ""

    @abstractmethod
    def session(self, products: Sequence[Node] = ()) -> dict[str, str]:
        """Session entries without which a file computes something else, or runs otherwise than planned.

        Args:
            products: of the whole file, rewritten.
        """

    @abstractmethod
    def numerics(self, kv_cache_bits: int | None = None) -> dict[str, str]:
        """What a user should know about the arithmetic.

        Args:
            kv_cache_bits: of a cache of codes; None where it is float.
        """

    @abstractmethod
    def rewrite(self, module: GraphModule, constants: set[str]) -> None:
        """Turn canonical QDQ into the forms that the provider has kernels for, and the graph into `dtype`, in place.

        Args:
            constants: names of tensors that are constants of the model, not weights.
        """

    @abstractmethod
    def kernel(self, product: Node) -> str:
        """The operator that the linear must have become in the optimized graph."""

    def slow(self, products: Sequence[Node]) -> dict[str, str]:
        """By name of the products that have several kernels, why theirs is not the fastest; empty where it is.

        Args:
            products: of the whole file, rewritten.
        """
        return {}

    def why_dense(self, form: MoeForm) -> str:
        """Why a mixture of experts computes every one for every token; empty where it does not."""
        return ""

    def prompt_twin(self, module: GraphModule) -> GraphModule | None:
        """What a canonical block is for prompts; None where there is one form for all."""
        return None


_T = TypeVar("_T", bound=type[Target])
_TARGETS: dict[str, type[Target]] = {}


def register(target: _T) -> _T:
    """Make a target known by its name, as a decorator.

    Raises:
        ValueError: the name is taken.
    """
    own = f"{__package__}.{target.name}"
    other = _TARGETS[target.name].__module__ if target.name in _TARGETS else own if target.name in BUILT_IN else ""
    if other and other != target.__module__:
        raise ValueError(f"{target.__module__}: the target {target.name!r} is in {other} already")
    _TARGETS[target.name] = target
    return target


def targets() -> dict[str, type[Target]]:
    """All that are registered, by name; those of this package first."""
    _import_built_in()
    return {name: _TARGETS[name] for name in sorted(_TARGETS, key=lambda n: (n not in BUILT_IN, n))}


def target_named(name: str) -> type[Target]:
    """The class of a target.

    Raises:
        InputError: none is called so.
    """
    known = targets()
    if name not in known:
        raise InputError(f"unknown target {name!r}", remedy=f"Targets are {', '.join(known)}")
    return known[name]


def target_for(
    name: str, recipe: Recipe, dtype: str | None = None, operators: OperatorSet = NATIVE
) -> Target:
    """The target that a user asks for.

    Args:
        dtype: by its name; None takes the target's first.
        operators: what files are made of.

    Raises:
        InputError: no such target, or it does not compute in this dtype.
        RecipeError: the recipe asks for a form that the target does not have.
    """
    found = target_named(name)
    known = {str(kind).removeprefix("torch."): kind for kind in found.dtypes}
    if dtype is not None and dtype not in known:
        raise InputError(
            f"computes in {' or '.join(known)} only, not in {dtype!r}", place=f"target {name}", remedy="Leave out dtype"
        )
    if recipe.prefill is not None and not operators.contrib:
        raise RecipeError(
            f"prefill: {recipe.prefill} is a second copy of the weights beside kernels of ONNX Runtime's own",
            place="prefill", remedy="Remove it, or take form native",
        )  # fmt: skip
    target = found.from_recipe(recipe, found.dtypes[0] if dtype is None else known[dtype])
    return replace(target, operators=operators)


@cache
def _import_built_in() -> None:
    for name in BUILT_IN:
        import_module(f"{__package__}.{name}")
