"""What to do to a model: which scheme each linear gets, and how its numbers are found. Presets: presets/*.yaml."""

import re
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ..artifact.files import read_text
from ..errors import InputError, RecipeError
from ..quant.formats import IntegerFormat, Scheme, begins_as_scheme, full_name
from .explaining import explain, nearest
from .reading import MOST_BYTES, read_yaml
from .sections import (
    FLOAT,
    TIED,
    ActivationSpec,
    CalibrationSpec,
    CrossQuantSpec,
    FptqSpec,
    KvCacheSpec,
    LlmInt8Spec,
    LoRCSpec,
    Override,
    RotationSpec,
    Section,
    SmoothSpec,
    WeightSpec,
    known_scheme,
    scheme_of_embedding,
    scheme_or_float,
)

_CACHE = re.compile(r"(?P<scheme>.+)_kv(?P<bits>[48])$", re.IGNORECASE)

# The dotted names that end so are the output projection of a language model.
_LM_HEAD = ("lm_head", "embed_out")


class Recipe(Section):
    """What to do to a model. What a recipe does not say is off: linears are rounded to nearest, nothing is smoothed.

    Attributes:
        name, description: for people.
        scheme: of every linear that no override names, e.g. "w4a16_g32".
        lm_head: scheme of the output projection, or "float".
        embedding: scheme of the token embedding, "float", or "tied": where it is one tensor with the output projection,
            both read the same codes.
        weights, activations, calibration: see their classes.
        rotation: see its class; None leaves the residual stream as it is.
        smooth, crossquant, fptq: see their classes; at most one of them, None for nothing of the kind.
        lorc, llm_int8: see their classes; None for no such branch.
        kv_cache: see its class; None keeps keys and values in float.
        overrides: the first that matches a linear's name decides, the output projection's too.
        accuracy_level: how ONNX Runtime's CPU kernel (MatMulNBits) treats the float activations of integer weights:
            4 rounds them to int8 per row and block and is fast; 1 keeps float32, and with 8-bit weights is slow.
        prefill: "int8": on the CPU, prompts multiply weight-only linears in groups as int8 per channel with inputs
            rounded to 8 bits per token, from a second copy of the weights. None: prompts run as single tokens do.
    """

    name: str = Field("custom", min_length=1)
    description: str = ""
    scheme: str
    lm_head: str = FLOAT
    embedding: str = FLOAT
    weights: WeightSpec = WeightSpec()
    rotation: RotationSpec | None = None
    smooth: SmoothSpec | None = None
    crossquant: CrossQuantSpec | None = None
    fptq: FptqSpec | None = None
    lorc: LoRCSpec | None = None
    llm_int8: LlmInt8Spec | None = None
    kv_cache: KvCacheSpec | None = None
    activations: ActivationSpec = ActivationSpec()
    overrides: tuple[Override, ...] = ()
    calibration: CalibrationSpec = CalibrationSpec()
    accuracy_level: Literal[1, 4] = 4
    prefill: Literal["int8"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_cache(cls, given: Any) -> Any:
        """w4a16_g32_kv8: the scheme, and how the cache is kept."""
        short = (
            _CACHE.match(given["scheme"]) if isinstance(given, dict) and isinstance(given.get("scheme"), str) else None
        )
        if short is None or given.get("kv_cache") is not None:
            return given
        return given | {"scheme": short["scheme"], "kv_cache": {"bits": int(short["bits"])}}

    @field_validator("scheme")
    @classmethod
    def _known(cls, name: str) -> str:
        return known_scheme(name)

    @field_validator("lm_head")
    @classmethod
    def _known_or_float(cls, name: str) -> str:
        return scheme_or_float(name)

    @field_validator("embedding")
    @classmethod
    def _known_table(cls, name: str) -> str:
        return scheme_of_embedding(name)

    @model_validator(mode="after")
    def _tied_to_codes(self) -> Self:
        # An override may give the output projection another scheme; then the plan says what becomes of it.
        codes = self.lm_head != FLOAT and Scheme.parse(self.lm_head).table
        if self.embedding == TIED and not codes and not self.overrides:
            raise ValueError(
                f"embedding: tied reads the codes of lm_head in groups, and lm_head is {self.lm_head}",
                "Set lm_head to w4a16_g32, w8a16_g32 or the like, or leave out embedding",
            )
        return self

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        given = [name for name in ("smooth", "crossquant", "fptq") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both decide the factors of activations", "Keep one of them")
        quantized = any(scheme.activation for scheme in self._schemes()) or self.prefill == "int8"
        for name in [n for n in (*given, "llm_int8") if getattr(self, n) is not None]:
            if not quantized and not (name == "smooth" and self.smooth.method == "awq"):
                raise ValueError(
                    f"{name} makes activations easier to quantize, and {self.scheme} keeps them in float",
                    f"Remove {name}, or take a scheme with a8",
                )
        if self.prefill is not None:
            self._check_prefill()
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
        if (short := _CACHE.match(text)) and text.lower() not in presets:
            base = cls.load(short["scheme"])
            cache = KvCacheSpec(bits=int(short["bits"]))
            return base.model_copy(update={"name": text.lower(), "kv_cache": cache})
        if text.lower() in presets:
            return cls._from_yaml(presets[text.lower()].read_text("utf-8"), f"preset {text.lower()}", text.lower())
        if begins_as_scheme(text.lower()):
            try:
                name = full_name(text)
            except RecipeError as error:
                remedy = nearest(text.lower(), presets) or error.remedy
                raise RecipeError(error.message, remedy=remedy) from None
            return cls.load(name) if name in presets else cls._from_scheme(Scheme.parse(name))
        if Path(text).is_file():
            return cls._from_file(Path(text))
        raise RecipeError(
            f"there is no preset, scheme or file {text!r}",
            remedy=nearest(text.lower(), presets) or f"Presets are {', '.join(presets)}",
        )

    @classmethod
    def presets(cls) -> dict[str, str]:
        """The description of every preset under its name, sorted by name."""
        return {name: cls.load(name).description for name in _preset_files()}

    @classmethod
    def _from_file(cls, path: Path) -> Self:
        try:
            text = read_text(path, MOST_BYTES)
        except InputError as error:
            raise RecipeError(error.message, place=error.place) from None
        return cls._from_yaml(text, str(path), path.stem)

    @classmethod
    def _from_yaml(cls, text: str, place: str, default_name: str) -> Self:
        data, lines = read_yaml(text, place)
        try:
            return cls.model_validate({"name": default_name, **data})
        except ValidationError as error:
            raise explain(cls, error, place, lines) from None

    @classmethod
    def _from_scheme(cls, scheme: Scheme) -> Self:
        family = scheme.weight.family(scheme.activation)
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

    def scheme_for(self, linear_name: str, projection: bool = False) -> Scheme | None:
        """The scheme of a linear by its dotted name, None when it stays float.

        Args:
            projection: it makes the logits, whatever its name is.
        """
        for override in self.overrides:
            if fnmatchcase(linear_name, override.match):
                name = override.scheme
                break
        else:
            head = projection or linear_name.rpartition(".")[2] in _LM_HEAD
            name = self.lm_head if head else self.scheme
        return None if name == FLOAT else Scheme.parse(name)

    def unmatched_overrides(self, linear_names: list[str]) -> list[str]:
        """The patterns of the overrides that decide nothing: they match no linear, or only ones matched before them."""
        used = {next((o for o in self.overrides if fnmatchcase(name, o.match)), None) for name in linear_names}
        return [override.match for override in self.overrides if override not in used]

    @property
    def needs_calibration(self) -> bool:
        """Whether statistics of activations are needed: for trained weights, factors, outliers and static scales."""
        static = any(scheme.activation and scheme.activation.kind == "static" for scheme in self._schemes())
        sections = (self.smooth, self.crossquant, self.fptq, self.llm_int8, self.kv_cache)
        weighted = self.lorc is not None and self.lorc.weighted
        trained = self.weights.method in ("gptq", "zq_local", "zq_global")
        return trained or weighted or static or any(section is not None for section in sections)

    def _check_prefill(self) -> None:
        """ONNX Runtime fails to load weight-only linears with one scale per channel within a branch of an If."""
        plain = [s for s in self._schemes() if s.activation is None and isinstance(s.weight, IntegerFormat)]
        if not any(s.weight.group_size > 0 for s in plain):
            raise ValueError(
                "prefill: int8 is for weight-only linears in groups", "Remove it, or take a scheme such as w4a16_g32"
            )
        if single := [s for s in plain if s.weight.group_size <= 0]:
            raise ValueError(f"{single[0].name} has no form beside prefill: int8", "Take a scheme with groups")
        if self.lorc is not None and self.lorc.factors == "int8":
            raise ValueError("lorc with factors: int8 has no form beside prefill: int8", "Take factors: float")

    def _schemes(self) -> list[Scheme]:
        names = [self.scheme, self.lm_head, *(override.scheme for override in self.overrides)]
        return [Scheme.parse(name) for name in names if name != FLOAT]


def _check_planes(schemes: list[Scheme]) -> None:
    """Rounding before the fold needs a place for the factor that the rounding did not see."""
    for scheme in schemes:
        if not scheme.weight.folds_columns and scheme.weight.bits != 8:
            raise ValueError(
                f"round_weights: before_fold has no form for {scheme.name}",
                "Take w8a8_dyn, or groups with _int: w4a8_g128_int",
            )


def _preset_files() -> dict[str, Any]:
    files = sorted(resources.files("qexport.recipe").joinpath("presets").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}
