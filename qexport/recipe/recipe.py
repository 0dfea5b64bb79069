"""What to do to a model: which scheme each linear gets, and how its numbers are found. Presets: presets/*.yaml."""

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from ..artifact.files import read_text
from ..errors import InputError, RecipeError
from ..quant.formats import IntegerFormat, Scheme, begins_as_scheme, full_name
from .catalogue import descriptions, preset_files, preset_of, wishes
from .explaining import explain, nearest
from .methods import CacheMethod, WeightMethod
from .reading import MOST_BYTES, read_yaml
from .registry import Method, MethodKeys, methods
from .sections import (
    FLOAT,
    TIED,
    ActivationSpec,
    CalibrationSpec,
    Override,
    TuneSpec,
    scheme_of_embedding,
    scheme_or_float,
)

# The dotted names that end so are the output projection of a language model.
_LM_HEAD = ("lm_head", "embed_out")


class Recipe(MethodKeys):
    """What to do to a model. What a recipe does not say is off: linears are rounded to nearest, nothing is smoothed.

    Besides these keys it has those of all methods that are registered, see `registry`.

    Attributes:
        name: for people, and in the report.
        description: for people.
        scheme: of every linear that no override names, e.g. "w4a16_g32", or "float".
        lm_head: scheme of the output projection, or "float".
        embedding: scheme of the token embedding, "float", or "tied": where it is one tensor with the output projection,
            both read the same codes. "auto": tied where it can be, in the 4 bits of lm_head where these cost the float
            model little KL by themselves, and else in 8 bits; the recipe of an export says which.
        whole_groups: where the last group of a weight would be padded and smaller groups that fill it take fewer bytes,
            take these.
        weights: how codes of weights are found; its key `method` says by what.
        activations: how scales of static activations are found.
        tune: how the quantized model is trained end to end; None for not at all.
        calibration: the text that statistics are taken on.
        overrides: the first that matches a linear's name decides, the output projection's too.
        accuracy_level: how ONNX Runtime's CPU kernel (MatMulNBits) treats the float activations of integer weights: 4
            rounds them to int8 per row and block and is fast; 1 keeps float32, and with 8-bit weights is slow.
        prefill: "int8": on the CPU, prompts multiply weight-only linears in groups as int8 per channel with inputs
            rounded to 8 bits per token, from a second copy of the weights. None: prompts run as single tokens do.
    """

    name: str = Field("custom", min_length=1)
    description: str = ""
    scheme: str
    lm_head: str = FLOAT
    embedding: str = FLOAT
    whole_groups: bool = False
    weights: SerializeAsAny[WeightMethod]
    activations: ActivationSpec = ActivationSpec()
    tune: TuneSpec | None = None
    overrides: tuple[Override, ...] = ()
    calibration: CalibrationSpec = CalibrationSpec()
    accuracy_level: Literal[1, 4] = 4
    prefill: Literal["int8"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, given: Any) -> Any:
        """Weights are always found somehow, and w4a16_g32_kv8 is short for the scheme and how the cache is kept."""
        if not isinstance(given, dict):
            return given
        given = {"weights": {}, **given}
        short = _shortened(given["scheme"]) if isinstance(given.get("scheme"), str) else None
        if short is None or given.get(short[1].key) is not None:
            return given
        return given | {"scheme": short[0], short[1].key: short[1]}

    @field_validator("scheme", "lm_head")
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
        quantized = any(scheme.activation for scheme in self.schemes) or self.prefill == "int8"
        by_kind: dict[str, Method] = {}
        for method in self.methods:
            other = by_kind.setdefault(method.kind, method)
            if method.alone and other is not method:
                raise ValueError(f"{other.key} and {method.key} both {method.alone}", "Keep one of them")
            if method.for_activations and not quantized:
                raise ValueError(
                    f"{method.key} makes activations easier to quantize, and {self.scheme} keeps them in float",
                    f"Remove {method.key}, or take a scheme with a8",
                )
            method.check(self)
        if self.prefill is not None:
            self._check_prefill()
        return self

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> Self:
        """Read a recipe: the name of a preset, a scheme (`w4a16_g64_asym`, `W4A16`) or the path of a YAML file.

        A scheme without a preset of its own takes everything else from the preset of its family.

        Raises:
            RecipeError: no such preset, scheme or file; bad YAML (with its line); an unknown key (with the nearest
                valid one) or a value out of range.
        """
        text = str(name_or_path)
        if isinstance(name_or_path, os.PathLike) or Path(text).suffix.lower() in (".yaml", ".yml") or "/" in text:
            return cls._from_file(Path(text))
        presets = preset_files()
        text = preset_of(text.lower()) if preset_of(text.lower()) in presets else text
        if text.lower() not in presets and (short := _shortened(text)):
            base, method = cls.load(short[0]), short[1]
            return base.model_copy(update={"name": text.lower(), method.key: method})
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
            remedy=nearest(text.lower(), presets) or f"Presets are {', '.join(dict.fromkeys((*wishes(), *presets)))}",
        )

    @classmethod
    def presets(cls) -> dict[str, str]:
        """The description of every preset under its name, sorted by name."""
        return descriptions()

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
            raise explain(cls, error, place, lines, data) from None

    @classmethod
    def _from_scheme(cls, scheme: Scheme) -> Self:
        family = scheme.weight.family(scheme.activation)
        base = cls.load(family)
        description = f"{scheme.name}, everything else as in {family}"
        return base.model_copy(update={"name": scheme.name, "description": description, "scheme": scheme.name})

    @classmethod
    def keeping_codes(cls, cache_numbers: str = "") -> Self:
        """The preset that keeps the codes of a checkpoint that is quantized already, and leaves the rest in float.

        Args:
            cache_numbers: of keys and values, rounded with the scales of the checkpoint; empty where they stay float.
        """
        name = next(m.method for m in methods() if issubclass(m, WeightMethod) and m.keeps_codes)
        if not cache_numbers:
            return cls.load(name)
        cache = next(m for m in methods() if issubclass(m, CacheMethod))
        made = cache.model_validate({"numbers": cache_numbers, "scales": "stored"})
        return cls.load(name).model_copy(update={cache.key: made})

    def to_yaml(self) -> str:
        """The whole recipe, defaults of what it uses included, as YAML that `load` reads back to an equal recipe."""
        dumped, data = self.model_dump(mode="json"), {}
        for key in type(self).model_fields:
            data[key] = dumped[key]
            if key == "weights":
                data |= {other: dumped[other] for other in self.given}
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)

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
        head = projection or linear_name.rpartition(".")[2] in _LM_HEAD
        found = self._override(linear_name, head)
        name = found.scheme if found is not None else self.lm_head if head else self.scheme
        return None if name == FLOAT else Scheme.parse(name)

    def _override(self, linear_name: str, projection: bool) -> Override | None:
        """The override that decides; one for everything leaves an output projection that `lm_head` keeps in float."""
        kept = projection and self.lm_head == FLOAT
        return next(
            (o for o in self.overrides if fnmatchcase(linear_name, o.match) and not (kept and set(o.match) <= {"*"})),
            None,
        )

    def unmatched_overrides(self, linear_names: Iterable[str]) -> list[str]:
        """The patterns of the overrides that decide nothing: they match no linear, or only ones matched before them."""
        used = {next((o for o in self.overrides if fnmatchcase(name, o.match)), None) for name in linear_names}
        return [override.match for override in self.overrides if override not in used]

    @property
    def needs_calibration(self) -> bool:
        """Whether statistics of activations are needed: by a method, or for scales of activations."""
        kinds = {scheme.activation.kind for scheme in self.schemes if scheme.activation}
        searched = "dynamic" in kinds and self.activations.token_clip == "search"
        asked = searched or "static" in kinds or self.tune is not None
        return asked or any(method.needs_calibration for method in self.methods)

    @property
    def always_calibrates(self) -> bool:
        """Whether statistics are needed whatever the model is, as nothing keeps linears in float by their names."""
        return self.needs_calibration and self.scheme != FLOAT and not self.overrides

    @property
    def schemes(self) -> list[Scheme]:
        """All that are named for linears; those of linears that stay float are not among them."""
        names = [self.scheme, self.lm_head, *(override.scheme for override in self.overrides)]
        return [Scheme.parse(name) for name in names if name != FLOAT]

    def takes(self, scheme: str) -> bool:
        """Whether its methods go with a scheme."""
        other = self.model_copy(update={"scheme": scheme})
        try:
            for method in self.methods:
                method.check(other)
        except ValueError:
            return False
        return True

    def _check_prefill(self) -> None:
        """ONNX Runtime fails to load weight-only linears with one scale per channel within a branch of an If."""
        plain = [s for s in self.schemes if s.activation is None and isinstance(s.weight, IntegerFormat)]
        if not any(s.weight.group_size > 0 for s in plain):
            raise ValueError(
                "prefill: int8 is for weight-only linears in groups", "Remove it, or take a scheme such as w4a16_g32"
            )
        if single := [s for s in plain if s.weight.group_size <= 0]:
            raise ValueError(f"{single[0].name} does not go with prefill: int8", "Use a scheme with groups")
        if other := next((m.ungrouped for m in self.methods if m.ungrouped), None):
            raise ValueError(f"{other[0]}, which does not go with prefill: int8", f"Remove prefill, or {other[1]}")


def _shortened(name: str) -> tuple[str, Method] | None:
    """A scheme's name without what is short for a method, and that method; None where nothing is."""
    for kind in methods():
        if kind.short and (found := re.fullmatch(f"(?P<scheme>.+)_{kind.short}", name, re.IGNORECASE)):
            parts = found.groupdict()
            return parts.pop("scheme"), kind.from_short(**parts)
    return None
