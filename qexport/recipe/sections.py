"""The sections that every recipe has, with their defaults, and what all sections share; see `registry` for methods."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..errors import RecipeError
from ..quant.formats import Scheme, full_name
from .explaining import explain, model_in

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as _ModelType
else:
    _ModelType = type(BaseModel)

FLOAT = "float"
TIED = "tied"
AUTO = "auto"


def known_scheme(name: str) -> str:
    try:
        return full_name(name)
    except RecipeError as error:
        # A ValueError keeps the key and the line: pydantic adds where it happened.
        raise ValueError(error.message, error.remedy) from None


def scheme_or_float(name: str) -> str:
    return FLOAT if name.lower() == FLOAT else known_scheme(name)


SchemeOrFloat = Annotated[str, AfterValidator(scheme_or_float)]


def scheme_of_embedding(name: str) -> str:
    if name.lower() in (FLOAT, TIED, AUTO):
        return name.lower()
    known = known_scheme(name)
    if not Scheme.parse(known).table:
        raise ValueError(
            f"{known} is not a scheme for an embedding: its rows are integer codes in groups, and no activation "
            "multiplies them",
            "Use w4a16_g32, w8a16_g32 and the like, tied, auto, or float",
        )
    return known


class _SectionType(_ModelType):
    """Makes a spec written in Python fail with the same RecipeError as one written in a file."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **fields)
        except ValidationError as error:
            raise explain(cast("type[Section]", cls), error, given=fields) from None


class Section(BaseModel, metaclass=_SectionType):
    """A mapping of a recipe: unknown keys are refused, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def known_keys(cls) -> list[str]:
        """The keys that it takes."""
        return list(cls.model_fields)

    @classmethod
    def part(cls, key: str, value: Any) -> type["Section"] | None:
        """What the mapping, or the items of the list, under a key are; None for plain values."""
        return model_in(cls.model_fields[key].annotation) if key in cls.model_fields else None

    @classmethod
    def called(cls) -> str:
        """What it is called beside what may stand in its place."""
        return cls.__name__

    @classmethod
    def keys_of_others(cls) -> dict[str, list[str]]:
        """Keys of what may stand in its place, and the names of those that take them."""
        return {}


class ActivationSpec(Section):
    """How the scale of a static activation is found; dynamic activations take theirs when the model runs.

    Attributes:
        token_clip: of dynamic activations the share of a token's largest magnitude that its range reaches to; "search":
            by the squared error on calibration data, for each value that linears read.
        observer: "absmax", "percentile" (of the absolute values) or "mse" (the clipping with the least squared error).
        percentile: in percent, for the percentile observer.
        only_kernel: an ablation: activations stay float, except that those which quantization would round to zero
            become zero (CrossQuant's quantization kernel).
    """

    observer: Literal["absmax", "percentile", "mse"] = "absmax"
    percentile: float = Field(99.99, gt=50, le=100)
    token_clip: Annotated[float, Field(gt=0, le=1)] | Literal["search"] = 1.0
    only_kernel: bool = False


class Override(Section):
    """A scheme, or "float", for the linears whose dotted name matches a shell pattern (`*` also crosses dots)."""

    match: str = Field(min_length=1)
    scheme: SchemeOrFloat


def only(name: str) -> str:
    """The pattern that matches this name and no other."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


class TuneSpec(Section):
    """Training of the quantized model end to end, by the KL to the float model on the calibration text.

    It comes after weights have become codes. The step with the least KL over an eighth of the batches, which is not
    trained on, is kept.

    Attributes:
        steps: updates of the whole model.
        batches: calibration batches of a step.
        rate: of scales, the share by which the first step changes them; 0 keeps them. Steps become smaller until the
            last.
        norm_rate: the same of gains and biases of norms.
        zero_rate: of zero points, in steps between codes; 0 keeps them.
        code_rate: of codes, in steps between codes; 0 keeps them, anything else takes eight bytes of memory a weight.
        check_every: steps from one look at the KL of what is not trained on to the next.
    """

    steps: int = Field(64, ge=1, le=100_000)
    batches: int = Field(2, ge=1, le=1024)
    rate: float = Field(0.002, ge=0, le=1)
    norm_rate: float = Field(0.002, ge=0, le=1)
    zero_rate: float = Field(0.0, ge=0, le=1)
    code_rate: float = Field(0.0, ge=0, le=1)
    check_every: int = Field(16, ge=1)

    def training_passes(self, samples: int, batch_size: int) -> float:
        """What it costs, in forward passes of all calibration data through the model; one back is two."""
        looks = 1 + self.steps / self.check_every
        return 4 * self.steps * self.batches * batch_size / samples + looks / 8 + 1


class CalibrationSpec(Section):
    """The text that statistics are taken on.

    Attributes:
        source: "self" (text the model writes), "random" (tokens of the vocabulary), the path of a UTF-8 text file, of a
            file of token ids (.npy, .bin of int32, .safetensors), of a .jsonl file of conversations ("messages"), or
            "datasets:ID:SPLIT:COLUMN" (see `calibrate.sources.kinds`).
        samples: number of sequences.
        sequence_length: tokens in a sequence.
        seed: of everything random.
        batch_size: sequences in a forward pass.
        packed: join texts, the tokenizer's end of a text between, and cut them into full sequences.
        products: what blocks multiply matrices as while data pass through them, and Hessians: "float32", or "bfloat16"
            where the device has it (see `device.products_in`). Weights are rounded in float32 either way.
    """

    source: str = Field("self", min_length=1)
    samples: int = Field(32, ge=1, le=100_000)
    sequence_length: int = Field(256, ge=1, le=1_000_000)
    seed: int = Field(0, ge=0, lt=2**63)
    batch_size: int = Field(4, ge=1, le=4_096)
    packed: bool = False
    products: Literal["float32", "bfloat16"] = "float32"
