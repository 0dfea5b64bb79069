"""The sections of a recipe, each with its defaults: what a key means and which values it takes."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator, model_validator

from ..errors import RecipeError
from ..quant.formats import Scheme, full_name
from .explaining import explain

FLOAT = "float"
TIED = "tied"


def known_scheme(name: str) -> str:
    try:
        return full_name(name)
    except RecipeError as error:
        # A ValueError keeps the key and the line: pydantic adds where it happened.
        raise ValueError(error.message, error.remedy) from None


def scheme_or_float(name: str) -> str:
    return FLOAT if name.lower() == FLOAT else known_scheme(name)


def scheme_of_embedding(name: str) -> str:
    if name.lower() in (FLOAT, TIED):
        return name.lower()
    known = known_scheme(name)
    if not Scheme.parse(known).table:
        raise ValueError(
            f"{known} is no scheme for an embedding: rows are looked up in integer codes in groups, by no activation",
            "Use w4a16_g32, w8a16_g32 and the like, tied, or float",
        )
    return known


class _SectionType(type(BaseModel)):
    """Makes a spec written in Python fail with the same RecipeError as one written in a file."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **fields)
        except ValidationError as error:
            raise explain(cls, error) from None


def _alpha(value: Any) -> float | str:
    if value == "search":
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"not a number from 0 to 1, nor search: {value!r}", "Write 0.5, or search")


Alpha = Annotated[float | str, PlainValidator(_alpha)]


class Section(BaseModel, metaclass=_SectionType):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightSpec(Section):
    """How weight codes are found.

    Attributes:
        method: "rtn" (round to nearest), "gptq" (arXiv 2210.17323), "hqq" (half-quadratic scales, no calibration),
            "zq_local" or "zq_global" (arXiv 2303.08302: weights trained so that each linear, or each block, gives what
            it gave in float when they are rounded; then rounded to nearest).
        damp: GPTQ: share of the mean of the Hessian's diagonal that is added to its diagonal.
        act_order: GPTQ: quantize the input features with the largest Hessian diagonal first.
        token_norm_power: gptq and zq_local: every token of the Hessian is divided by its L2 norm to this power, for
            zq_global the error of a token by its target's; 0 leaves tokens as they are, 1 keeps the few tokens with
            huge activations from drowning out the others.
        clip_search: rtn and gptq: shrink the range of each scale where that lowers the squared error of the weights.
        learning_rates: zq_local and zq_global: tried one after another, as shares of the mean step between codes; the
            one with the smallest error stays.
        steps: zq_local and zq_global: most updates with one learning rate; less when the error stops falling.
    """

    method: Literal["rtn", "gptq", "hqq", "zq_local", "zq_global"] = "rtn"
    damp: float = Field(0.01, gt=0, le=1)
    act_order: bool = False
    token_norm_power: float = Field(0.75, ge=0, le=2)
    clip_search: bool = False
    learning_rates: tuple[float, ...] = Field((0.01, 0.03, 0.1), min_length=1, max_length=16)
    steps: int = Field(40, ge=1, le=100_000)

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if not all(rate > 0 for rate in rates):
            raise ValueError("learning rates are above 0", "Leave the key out for 0.01, 0.03 and 0.1")
        return rates


class SmoothSpec(Section):
    """A factor per channel from activations to weights, which keeps the function.

    Attributes:
        method: "smoothquant": max|X|^alpha / max|W|^(1-alpha) (arXiv 2211.10438); "awq": mean|X|^alpha, for weights
            rather than activations (arXiv 2306.00978); "lae": max|X| / log2(2 + max|X|) (FPTQ, arXiv 2308.15987).
        alpha: a number, or "search" for the one with the least output error at each place; lae has none.
        explicit: where nothing in front can take the division, insert a multiplication instead of leaving the place.
    """

    method: Literal["smoothquant", "awq", "lae"] = "smoothquant"
    alpha: Alpha = 0.5
    explicit: bool = False


class CrossQuantSpec(Section):
    """Activation steps from token and channel together: t^alpha c^(1-alpha) / qmax (CrossQuant, arXiv 2410.07505).

    The channel part is calibrated and folded away, so that one integer matmul is left.

    Attributes:
        alpha: 1 is one scale per token, 0 one per channel; "search" takes the one with the least output error at each
            place.
        row_scale: "folded": the largest magnitude of the folded token; "paper": t^alpha, widened where a channel
            exceeds its calibrated range, which would clip; "dynamic": as published, both parts measured when it runs,
            which takes a float matmul (for comparison; alpha has to be a number).
        round_weights: "after_fold": the folded weight is rounded; "before_fold": the weight is rounded as the paper
            does it, then folded: 8-bit weights become two int8 planes, and `_int` schemes fold while they expand.
        explicit: where nothing in front can take the division, insert a multiplication instead of leaving the place.
    """

    alpha: Alpha = 0.15
    row_scale: Literal["folded", "paper", "dynamic"] = "folded"
    round_weights: Literal["after_fold", "before_fold"] = "after_fold"
    explicit: bool = False


class FptqSpec(Section):
    """A policy for each activation by r, its largest magnitude on calibration data (FPTQ, arXiv 2308.15987).

    Attributes:
        static_up_to: r up to this: one static scale as it is.
        dynamic_from: r from this: one scale per token; between the two: logarithmic equalization, then a static scale.
    """

    static_up_to: float = Field(15.0, ge=0)
    dynamic_from: float = Field(150.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.dynamic_from < self.static_up_to:
            raise ValueError("dynamic_from is below static_up_to", "Leave both out for 150 and 15")
        return self


class KvCacheSpec(Section):
    """Keys and values of attention in few bits; takes grouped attention. `w4a16_g32_kv8` is short for it.

    Attributes:
        bits: 8 or 4.
        scales: "channel" (one for every feature of every head) or "tensor" (one for all keys, one for all values).
    """

    bits: Literal[8, 4] = 8
    scales: Literal["channel", "tensor"] = "channel"


class RotationSpec(Section):
    """A rotation of the residual stream by a Hadamard matrix, folded into the weights (QuaRot, arXiv 2404.00456).

    It spreads the outliers of a few channels over all of them, and changes no result of the float model. For decoders
    whose residual stream is read through norms and written by linears and embeddings.

    Attributes:
        seed: of the random signs of its rows.
    """

    seed: int = Field(0, ge=0, lt=2**63)


class LoRCSpec(Section):
    """A low-rank branch that gives back part of the weights' rounding error (LoRC, arXiv 2303.08302).

    Attributes:
        rank: of the branch.
        factors: "float", or "int8" with one scale per column.
        shared: linears that read one value (q, k and v; gate and up) share the first factor.
        weighted: weigh the error of each input feature by its mean magnitude (LQER, arXiv 2402.02446); calibrates.
    """

    rank: int = Field(8, ge=1, le=65_536)
    factors: Literal["float", "int8"] = "float"
    shared: bool = False
    weighted: bool = False


class LlmInt8Spec(Section):
    """Input features with outliers go through a float path (LLM.int8(), arXiv 2208.07339).

    Attributes:
        threshold: features with a larger magnitude on calibration data are outliers.
    """

    threshold: float = Field(6.0, gt=0)


class ActivationSpec(Section):
    """How the scale of a static activation is found; dynamic activations take theirs when the model runs.

    Attributes:
        observer: "absmax", "percentile" (of the absolute values) or "mse" (the clipping with the least squared error).
        percentile: in percent, for the percentile observer.
        only_kernel: an ablation: activations stay float, except that those which quantization would round to zero
            become zero (CrossQuant's quantization kernel).
    """

    observer: Literal["absmax", "percentile", "mse"] = "absmax"
    percentile: float = Field(99.99, gt=50, le=100)
    only_kernel: bool = False


class Override(Section):
    """A scheme, or "float", for the linears whose dotted name matches a shell pattern (`*` also crosses dots)."""

    match: str = Field(min_length=1)
    scheme: str

    @field_validator("scheme")
    @classmethod
    def _known(cls, name: str) -> str:
        return scheme_or_float(name)


def only(name: str) -> str:
    """The pattern that matches this name and no other."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


class CalibrationSpec(Section):
    """The text that statistics are taken on.

    Attributes:
        source: "self" (text the model writes), "random" (tokens of the vocabulary), the path of a UTF-8 text file, or
            "datasets:ID:SPLIT:COLUMN" (see `calibrate.sources.load_samples`).
        samples: number of sequences.
        sequence_length: tokens in a sequence.
        seed: of everything random.
        batch_size: sequences in a forward pass.
    """

    source: str = Field("self", min_length=1)
    samples: int = Field(32, ge=1, le=100_000)
    sequence_length: int = Field(256, ge=1, le=1_000_000)
    seed: int = Field(0, ge=0, lt=2**63)
    batch_size: int = Field(4, ge=1, le=4_096)
