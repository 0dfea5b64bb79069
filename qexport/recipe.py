"""What to do to a model: which scheme each linear gets, and how its numbers are found. Presets: recipes/*.yaml."""

import difflib
import re
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator, model_validator

from .errors import RecipeError
from .numerics.formats import Scheme
from .recipes.reading import read_yaml

FLOAT = "float"

# The dotted names that end so are the output projection of a language model.
_LM_HEAD = ("lm_head", "embed_out")

# A weight-only scheme without a group is what other tools mean by it: groups, because one scale per channel is too
# coarse for 4 bits and saves nothing in speed at 8. `_pc` asks for one scale per channel.
_SHORT = {
    "w4a16": "w4a16_g128",
    "w4a16_asym": "w4a16_g128_asym",
    "w8a16": "w8a16_g32",
    "w8a16_asym": "w8a16_g32_asym",
    "w8a8": "w8a8_dyn",
}


def scheme_name(name: str) -> str:
    """The full lower-case name of a scheme: `W4A16` -> `w4a16_g128`, `w8a8` -> `w8a8_dyn`.

    Raises:
        RecipeError: no such scheme.
    """
    return Scheme.parse(_SHORT.get(name.lower(), name)).name


class _SpecType(type(BaseModel)):
    """Makes a spec written in Python fail with the same RecipeError as one written in a file."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **fields)
        except ValidationError as error:
            raise _explain(cls, error) from None


def _alpha(value: Any) -> float | str:
    if value == "search":
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"not a number from 0 to 1, nor search: {value!r}", "Write 0.5, or search")


Alpha = Annotated[float | str, PlainValidator(_alpha)]


class _Spec(BaseModel, metaclass=_SpecType):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightSpec(_Spec):
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
    learning_rates: tuple[float, ...] = Field((0.01, 0.03, 0.1), min_length=1)
    steps: int = Field(40, ge=1)

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if not all(rate > 0 for rate in rates):
            raise ValueError("learning rates are above 0", "Leave the key out for 0.01, 0.03 and 0.1")
        return rates


class SmoothSpec(_Spec):
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


class CrossQuantSpec(_Spec):
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


class FptqSpec(_Spec):
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


class LoRCSpec(_Spec):
    """A low-rank branch that gives back part of the weights' rounding error (LoRC, arXiv 2303.08302).

    Attributes:
        rank: of the branch.
        factors: "float", or "int8" with one scale per column.
        shared: linears that read one value (q, k and v; gate and up) share the first factor.
        weighted: weigh the error of each input feature by its mean magnitude (LQER, arXiv 2402.02446); calibrates.
    """

    rank: int = Field(8, ge=1)
    factors: Literal["float", "int8"] = "float"
    shared: bool = False
    weighted: bool = False


class LlmInt8Spec(_Spec):
    """Input features with outliers go through a float path (LLM.int8(), arXiv 2208.07339).

    Attributes:
        threshold: features with a larger magnitude on calibration data are outliers.
    """

    threshold: float = Field(6.0, gt=0)


class ActivationSpec(_Spec):
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


class Override(_Spec):
    """A scheme, or "float", for the linears whose dotted name matches a shell pattern (`*` also crosses dots)."""

    match: str = Field(min_length=1)
    scheme: str

    @field_validator("scheme")
    @classmethod
    def _known(cls, name: str) -> str:
        return _scheme_or_float(name)


class CalibrationSpec(_Spec):
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
    samples: int = Field(32, ge=1)
    sequence_length: int = Field(256, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    batch_size: int = Field(4, ge=1)


class Recipe(_Spec):
    """What to do to a model. What a recipe does not say is off: linears are rounded to nearest, nothing is smoothed.

    Attributes:
        name, description: for people.
        scheme: of every linear that no override names, e.g. "w4a16_g32".
        lm_head: scheme of the output projection, or "float".
        weights, activations, calibration: see their classes.
        smooth, crossquant, fptq: see their classes; at most one of them, None for nothing of the kind.
        lorc, llm_int8: see their classes; None for no such branch.
        overrides: the first that matches a linear's name decides, the output projection's too.
        accuracy_level: how ONNX Runtime's CPU kernel (MatMulNBits) treats the float activations of integer weights:
            4 rounds them to int8 per row and block and is fast; 1 keeps float32, and with 8-bit weights is slow.
    """

    name: str = Field("custom", min_length=1)
    description: str = ""
    scheme: str
    lm_head: str = FLOAT
    weights: WeightSpec = WeightSpec()
    smooth: SmoothSpec | None = None
    crossquant: CrossQuantSpec | None = None
    fptq: FptqSpec | None = None
    lorc: LoRCSpec | None = None
    llm_int8: LlmInt8Spec | None = None
    activations: ActivationSpec = ActivationSpec()
    overrides: tuple[Override, ...] = ()
    calibration: CalibrationSpec = CalibrationSpec()
    accuracy_level: Literal[1, 4] = 4

    @field_validator("scheme")
    @classmethod
    def _known(cls, name: str) -> str:
        return _scheme(name)

    @field_validator("lm_head")
    @classmethod
    def _known_or_float(cls, name: str) -> str:
        return _scheme_or_float(name)

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        given = [name for name in ("smooth", "crossquant", "fptq") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both decide the factors of activations", "Keep one of them")
        quantized = any(scheme.activation for scheme in self._schemes())
        for name in [n for n in (*given, "llm_int8") if getattr(self, n) is not None]:
            if not quantized and not (name == "smooth" and self.smooth.method == "awq"):
                raise ValueError(
                    f"{name} makes activations easier to quantize, and {self.scheme} keeps them in float",
                    f"Remove {name}, or take a scheme with a8",
                )
        if self.crossquant is not None and self.crossquant.row_scale == "dynamic":
            if self.crossquant.alpha == "search" or self.crossquant.round_weights == "before_fold":
                raise ValueError("row_scale: dynamic folds nothing", "Give alpha a number and leave out round_weights")
        elif self.crossquant is not None and self.crossquant.round_weights == "before_fold":
            _check_planes([scheme for scheme in self._schemes() if scheme.activation])
        return self

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """Read a recipe: the name of a preset, a scheme (`w4a16_g64_asym`, `W4A16`) or the path of a YAML file.

        A scheme without a preset of its own takes everything else from the preset of its family.

        Raises:
            RecipeError: no such preset, scheme or file; bad YAML (with its line); an unknown key (with the nearest
                valid one) or a value out of range.
        """
        text = str(name_or_path)
        if isinstance(name_or_path, Path) or Path(text).suffix.lower() in (".yaml", ".yml") or "/" in text:
            return cls._from_file(Path(text))
        presets = _preset_files()
        if text.lower() in presets:
            return cls._from_yaml(presets[text.lower()].read_text("utf-8"), f"preset {text.lower()}", text.lower())
        if re.match(r"w\d+a\d+|nf4|fp4", text.lower()):
            try:
                name = scheme_name(text)
            except RecipeError as error:
                remedy = _nearest(text.lower(), presets) or error.remedy
                raise RecipeError(error.message, remedy=remedy) from None
            return cls.load(name) if name in presets else cls._from_scheme(Scheme.parse(name))
        if Path(text).is_file():
            return cls._from_file(Path(text))
        raise RecipeError(
            f"there is no preset, scheme or file {text!r}",
            remedy=_nearest(text.lower(), presets) or f"Presets are {', '.join(presets)}",
        )

    @classmethod
    def presets(cls) -> dict[str, str]:
        """The description of every preset under its name, sorted by name."""
        return {name: cls.load(name).description for name in _preset_files()}

    @classmethod
    def _from_file(cls, path: Path) -> Self:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise RecipeError(f"cannot read the recipe: {error.strerror}", place=str(path)) from None
        except UnicodeDecodeError as error:
            raise RecipeError(f"byte {error.start} is not UTF-8", place=str(path)) from None
        return cls._from_yaml(text, str(path), path.stem)

    @classmethod
    def _from_yaml(cls, text: str, place: str, default_name: str) -> Self:
        data, lines = read_yaml(text, place)
        try:
            return cls.model_validate({"name": default_name, **data})
        except ValidationError as error:
            raise _explain(cls, error, place, lines) from None

    @classmethod
    def _from_scheme(cls, scheme: Scheme) -> Self:
        bits, act = scheme.weight.bits, scheme.activation
        if scheme.weight.codebook:
            family = scheme.weight.codebook
        elif act is None:
            family = "w8a16" if bits == 8 else "w4a16_g128"
        elif bits == 8:
            family = "w8a8_static" if act.kind == "static" else "w8a8_dyn"
        else:
            family = "w4a8_g128" if scheme.weight.group_size > 0 else "w4a8"
        base = cls.load(family)
        description = f"{scheme.name}, everything else as in {family}"
        return base.model_copy(update={"name": scheme.name, "description": description, "scheme": scheme.name})

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML that `load` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def with_calibration(self, **values: Any) -> Self:
        """The same recipe with other calibration keys; None leaves a key as it is.

        Raises:
            RecipeError: unknown key or value out of range.
        """
        given = {key: value for key, value in values.items() if value is not None}
        return self.model_copy(update={"calibration": CalibrationSpec(**{**self.calibration.model_dump(), **given})})

    def scheme_for(self, linear_name: str) -> Scheme | None:
        """The scheme of a linear by its dotted name, None when it stays float."""
        for override in self.overrides:
            if fnmatchcase(linear_name, override.match):
                name = override.scheme
                break
        else:
            name = self.lm_head if linear_name.rpartition(".")[2] in _LM_HEAD else self.scheme
        return None if name == FLOAT else Scheme.parse(name)

    def unmatched_overrides(self, linear_names: list[str]) -> list[str]:
        """The patterns of the overrides that decide nothing: they match no linear, or only ones matched before them."""
        used = {next((o for o in self.overrides if fnmatchcase(name, o.match)), None) for name in linear_names}
        return [override.match for override in self.overrides if override not in used]

    @property
    def needs_calibration(self) -> bool:
        """Whether statistics of activations are needed: for trained weights, factors, outliers and static scales."""
        static = any(scheme.activation and scheme.activation.kind == "static" for scheme in self._schemes())
        sections = (self.smooth, self.crossquant, self.fptq, self.llm_int8)
        weighted = self.lorc is not None and self.lorc.weighted
        trained = self.weights.method in ("gptq", "zq_local", "zq_global")
        return trained or weighted or static or any(section is not None for section in sections)

    def _schemes(self) -> list[Scheme]:
        names = [self.scheme, self.lm_head, *(override.scheme for override in self.overrides)]
        return [Scheme.parse(name) for name in names if name != FLOAT]


def _scheme(name: str) -> str:
    try:
        return scheme_name(name)
    except RecipeError as error:
        # A ValueError keeps the key and the line: pydantic adds where it happened.
        raise ValueError(error.message, error.remedy) from None


def _check_planes(schemes: list[Scheme]) -> None:
    """Rounding before the fold needs a place for the factor that the rounding did not see."""
    for scheme in schemes:
        if not scheme.expand and scheme.weight.bits != 8:
            raise ValueError(
                f"round_weights: before_fold has no form for {scheme.name}",
                "Take w8a8_dyn, or groups with _int: w4a8_g128_int",
            )


def _scheme_or_float(name: str) -> str:
    return FLOAT if name.lower() == FLOAT else _scheme(name)


def _preset_files() -> dict[str, Any]:
    files = sorted(resources.files("qexport.recipes").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}


def _nearest(word: str, known: Any) -> str | None:
    near = difflib.get_close_matches(word, [str(name) for name in known], n=1)
    return f"Did you mean {near[0]}?" if near else None


def _explain(
    spec: type[BaseModel], error: ValidationError, file: str | None = None, lines: dict[tuple, int] | None = None
) -> RecipeError:
    """The first problem pydantic found, with its key, its line and what to do."""
    # A misspelt key is also a missing one: tell the misspelling.
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    path, kind, remedy = first["loc"], first["type"], None
    if kind == "extra_forbidden":
        message = "unknown key"
        valid = _section(spec, path[:-1]).model_fields
        remedy = _nearest(str(path[-1]), valid) or f"Keys here are {', '.join(valid)}"
    elif kind == "missing":
        message = "this key is missing"
    elif kind == "value_error":
        message, remedy = (*first["ctx"]["error"].args, None)[:2]
    else:
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
    known = [part for part in (path, path[:-1]) if lines and part in lines]
    where = f"{file}:{lines[known[0]]}" if known else file
    return RecipeError(message, place=", ".join(filter(None, [where, ".".join(map(str, path))])) or None, remedy=remedy)


def _section(spec: type[BaseModel], path: tuple) -> type[BaseModel]:
    for key in path:
        if isinstance(key, str):
            spec = _model_in(spec.model_fields[key].annotation)
    return spec


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)
