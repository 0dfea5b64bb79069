"""What methods of each kind declare besides their keys, and how they make their passes.

Passes lie above recipes, so their types are named here for readers and type checkers alone.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .registry import Method, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..passes.base import GraphPass
    from ..passes.model.base import ModelPass
    from ..plan.linear_plan import LinearPlan
    from ..quant.formats import IntegerFormat, QuantizedWeight


class ModelMethod(Method):
    """Changes the whole model before its blocks are quantized, without changing what it computes."""

    kind: ClassVar[str] = "model"
    stage: ClassVar[Stage] = Stage.MODEL

    @abstractmethod
    def model_passes(self) -> "list[ModelPass]":
        """The passes over the model, in order."""


class BlockMethod(Method):
    """Changes one block at a time.

    Attributes:
        takes_shared: it leaves a weight that several linears read the same for all of them; where a method of a recipe
            does not, such weights stay float.
    """

    takes_shared: ClassVar[bool] = False

    @abstractmethod
    def passes(self, plan: "Mapping[str, LinearPlan]") -> "list[GraphPass]":
        """The passes of a block, in order; plan: the decision for every linear, by name."""


class Equalization(BlockMethod):
    """Moves factors between activations and weights, and keeps the function."""

    kind: ClassVar[str] = "equalization"
    stage: ClassVar[Stage] = Stage.EQUALIZE
    calibrates: ClassVar[bool] = True
    for_activations: ClassVar[bool] = True
    alone: ClassVar[str] = "decide the factors of activations"

    def quantizer_options(self) -> Mapping[str, Any]:
        """What it asks of the pass that quantizes activations, by the names of that pass's attributes."""
        return {}

    def why_float_products(self) -> str:
        """Why linears with quantized inputs keep products of floats; empty where they do not."""
        return ""


class WeightMethod(BlockMethod):
    """Finds the codes of weights.

    Attributes:
        kl_left: the share of the KL of rounding to nearest that it is expected to leave; mixed precision prices schemes
            with it until an export has been measured.
        kl_left_narrowed: the same, of rounding in ranges that are narrowed as it does it, where it does.
        clips_by_inputs: where it narrows ranges, it weighs the errors of a weight by the squares of its inputs.
        keeps_codes: weights that are codes in the checkpoint keep these.
    """

    kind: ClassVar[str] = "weights"
    stage: ClassVar[Stage] = Stage.ROUND
    shared_key: ClassVar[str] = "weights"
    kl_left: ClassVar[float] = 1.0
    kl_left_narrowed: ClassVar[float] = 1.0
    clips_by_inputs: ClassVar[bool] = False
    keeps_codes: ClassVar[bool] = False

    @property
    def clips(self) -> bool:
        """Whether it narrows the range of a group where that makes its error smaller (the key `clip_search`)."""
        return bool(getattr(self, "clip_search", False))

    @property
    def rounds_tables(self) -> bool:
        """Whether it finds the codes of tables of embeddings too; else they are rounded to nearest."""
        return type(self).round_table is not WeightMethod.round_table

    def table_statistic(self) -> Any:
        """An empty statistic of what an output projection reads that shares its codes with a table of embeddings; None
        where the codes of tables follow from the weights alone. It has `update(x)` and `unseen()`."""
        return None

    def training_passes(self, samples: int, batch_size: int) -> float:
        """What its training costs a block, in forward passes of all calibration data through it; one back is two."""
        return 0.0

    def round_table(self, table: "Tensor", fmt: "IntegerFormat", seen: Any) -> "QuantizedWeight":
        """The codes of a table of embeddings [V, K].

        Args:
            seen: the filled `table_statistic`; None where there is none, or no data.
        """
        raise NotImplementedError


class Branch(BlockMethod):
    """Adds a path beside quantized linears."""

    kind: ClassVar[str] = "branches"
    stage: ClassVar[Stage] = Stage.CORRECT


class CacheMethod(BlockMethod):
    """Quantizes keys and values that attention keeps."""

    kind: ClassVar[str] = "cache"
    stage: ClassVar[Stage] = Stage.CACHE
    calibrates: ClassVar[bool] = True
    of_linears: ClassVar[bool] = False
    alone: ClassVar[str] = "decide how keys and values are kept"

    @classmethod
    def candidates(cls) -> Sequence[Self]:
        """What mixed precision chooses from, besides a cache of floats."""
        return ()

    @property
    @abstractmethod
    def called_numbers(self) -> str:
        """What the cache holds, such as "int8"."""

    @abstractmethod
    def bits_kept(self, float_bits: int, e4m3: bool) -> int:
        """Bits of a number in the cache.

        Args:
            float_bits: of a number that stays float; e4m3: whether the target keeps E4M3 numbers.
        """

    @abstractmethod
    def rounded(self, x: "Tensor") -> "Tensor":
        """Keys or values as the cache gives them back, with scales for their own ranges.

        Args:
            x: float32 [batch, kv_heads, tokens, head_dim].
        """
