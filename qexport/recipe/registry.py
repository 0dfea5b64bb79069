"""The methods that a recipe can name.

Each method is one file that declares itself: a section of a recipe with its keys, what it needs, and how it makes its
passes (see `methods`). Nothing else knows its name; passes/README.md shows how to add one.
"""

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, create_model, model_serializer, model_validator

from ..errors import RecipeError
from ..plugins import import_folder, import_plugins
from .sections import Section

if TYPE_CHECKING:
    from .recipe import Recipe

# What a method does. The methods of the package are in the folders of these names below `qexport.passes`.
KINDS = ("model", "equalization", "branches", "weights", "cache")
# Packages that bring methods name their modules under this group; importing a module registers what it declares.
ENTRY_POINTS = "qexport.methods"


class Stage(IntEnum):
    """When the passes of a method run, in this order."""

    MODEL = 0  # once, over the graphs of all blocks
    EQUALIZE = 1  # exact transformations of the float block
    SEPARATE = 2  # what takes features away before weights are rounded
    ROUND = 3  # weights become codes
    CORRECT = 4  # what looks at the error of rounded weights
    CACHE = 5  # keys and values that attention keeps


class Method(Section):
    """A section of a recipe that is a method. Derive from one of `methods`, not from this.

    Attributes:
        kind: one of KINDS; its base says which.
        method, key: the name it is registered under, and the recipe's key that it stands under; `method` sets both.
        stage: when its passes run.
        calibrates: its passes want calibration data. Where that depends on its keys, override `needs_calibration`.
        for_activations: it makes activations easier to quantize, and is refused where none is quantized.
        of_linears: it works on quantized linears, and does nothing where there are none.
        needs_grouped_attention: it is refused where attention is not grouped.
        alone: what two methods of this kind in one recipe would both do; empty where there may be several.
        short: a pattern of what may follow the name of a scheme in place of the section, see `from_short`.
    """

    kind: ClassVar[str]
    method: ClassVar[str]
    key: ClassVar[str]
    stage: ClassVar[Stage]
    calibrates: ClassVar[bool] = False
    for_activations: ClassVar[bool] = False
    of_linears: ClassVar[bool] = True
    needs_grouped_attention: ClassVar[bool] = False
    alone: ClassVar[str] = ""
    short: ClassVar[str] = ""
    shared_key: ClassVar[str] = ""  # of its kind, where all methods of it stand under one key

    @property
    def needs_calibration(self) -> bool:
        return self.calibrates

    @property
    def ungrouped(self) -> tuple[str, str] | None:
        """Which of its integer weights have one scale per column, for which not every target has kernels, and what to
        do instead; None where there are none."""
        return None

    def check(self, recipe: "Recipe") -> None:  # noqa: B027  most methods go with everything
        """Refuse what it does not go with.

        Raises:
            ValueError: what is wrong, and what to do.
        """

    @classmethod
    def from_short(cls, **parts: str) -> "Method":
        """The section that a scheme's suffix stands for; parts: the named groups of `short`."""
        raise NotImplementedError

    @classmethod
    def known_keys(cls) -> list[str]:
        return [*(() if cls.key == cls.method else ("method",)), *cls.model_fields]

    @classmethod
    def called(cls) -> str:
        return cls.method

    @classmethod
    def keys_of_others(cls) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, other in under(cls.key).items():
            for key in () if other is cls else other.model_fields:
                found.setdefault(key, []).append(name)
        return found

    @model_serializer(mode="wrap")
    def _with_name(self, fields: Any) -> dict[str, Any]:
        """Methods that share a key are told apart by `method`."""
        return ({} if self.key == self.method else {"method": self.method}) | fields(self)


M = TypeVar("M", bound=type[Method])
_REGISTERED: dict[tuple[str, str], type[Method]] = {}
_DEFAULTS: dict[str, str] = {}


def method(kind: str, name: str, *, key: str = "", default: bool = False) -> Callable[[M], M]:
    """Register a section of a recipe as a method.

    Args:
        kind, name: what it is known by; a name is given once.
        key: the recipe's key that it stands under, if other methods stand there too: `method: NAME` chooses among
            them. Otherwise its name is its key.
        default: of the methods under a key, the one that is meant without `method`.

    Raises:
        RecipeError: the name is taken, or the kind is not that of the class.
    """

    def register(cls: M) -> M:
        cls.method, cls.key = name, key or cls.shared_key or name
        other = _REGISTERED.get((kind, name))
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RecipeError(f"{name} of {kind} is registered twice, by {other.__module__} and by {cls.__module__}")
        if kind not in KINDS or cls.kind != kind:
            raise RecipeError(f"{cls.__name__} is of {cls.kind}, not of {kind}", remedy=f"Kinds are {', '.join(KINDS)}")
        alike = (kind, cls.key == name)  # a key belongs to one method, or to some of a kind that `method` tells apart
        if any(m.key == cls.key and (m.kind, m.key == m.method) != alike for m in _REGISTERED.values()):
            raise RecipeError(f"{cls.key} is a key of other methods", place=cls.__name__)
        _REGISTERED[kind, name] = cls
        if default:
            _DEFAULTS[cls.key] = name
        return cls

    return register


def under(key: str) -> dict[str, type[Method]]:
    """The methods under a key of a recipe, by name; none where the key is not one of methods."""
    return {m.method: m for m in methods() if m.key == key}


def methods() -> list[type[Method]]:
    """All that are registered, in the order in which they run and then by name."""
    _discover()
    return sorted(_REGISTERED.values(), key=lambda m: (m.stage, m.key, m.method))


def chosen(key: str, given: Any) -> type[Section] | None:
    """The section that the value under a key of a recipe is; None where there is no such key.

    A `method` that nobody registered gives a section that takes the known names.
    """
    known = under(key)
    if not known:
        return None
    if isinstance(given, Method):
        return type(given) if type(given) in known.values() else next(iter(known.values()))
    name = given.get("method", _DEFAULTS.get(key)) if isinstance(given, Mapping) else _DEFAULTS.get(key)
    if key in known:  # a key of its own
        name = key
    if isinstance(name, str) and name in known:
        return known[name]
    names: Any = Literal[tuple(sorted(known))]
    return create_model("Named", __base__=_Named, method=(names, ...))


class _Named(Section):
    model_config = ConfigDict(extra="ignore")


def section(key: str, **fields: Any) -> Method:
    """The section under a key of a recipe: section("weights", method="gptq", damp=0.02).

    Raises:
        RecipeError: as for a recipe.
    """
    return MethodKeys(**{key: fields}).given[key]


class MethodKeys(Section):
    """A section with the keys of all methods besides its own; one with None is as good as absent."""

    model_config = ConfigDict(extra="allow")

    @property
    def given(self) -> dict[str, Method]:
        """The methods by their keys."""
        return {key: value for key, value in dict(self).items() if isinstance(value, Method)}

    @property
    def methods(self) -> list[Method]:
        """The methods in the order in which they run, then by name."""
        return sorted(self.given.values(), key=lambda m: (m.stage, m.key))

    @classmethod
    def known_keys(cls) -> list[str]:
        return list(dict.fromkeys([*cls.model_fields, *(m.key for m in methods())]))

    @classmethod
    def part(cls, key: str, value: Any) -> type[Section] | None:
        return chosen(key, value) or super().part(key, value)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        """Make sections of the keys that name methods; what is no key of anything is refused on the way."""
        if not isinstance(given, dict):
            return given
        fields: dict[str, Any] = {}
        values: dict[Any, Any] = {}
        for key, value in given.items():
            kind = chosen(key, value) if isinstance(key, str) else None
            if kind is None and key not in cls.model_fields:
                values[key] = value  # unknown
            elif kind is not None and value is not None:
                fields[key], values[key] = (kind, ...), _without_name(kind, value)
        model = create_model("Sections", __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)
        known = {key: value for key, value in given.items() if key in cls.model_fields and key not in fields}
        return known | dict(model.model_validate(values))

    if not TYPE_CHECKING:  # so that misspelt attributes of recipes are found where types are checked

        def __getattr__(self, name: str) -> Any:
            """A method that is not given is None."""
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("_") or not under(name):
                    raise
                return None


def _without_name(kind: type[Section], value: Any) -> Any:
    """A mapping without `method`, where that has chosen the section."""
    shared = issubclass(kind, Method) and kind.key != kind.method
    return {k: v for k, v in value.items() if k != "method"} if shared and isinstance(value, Mapping) else value


_discovered = False


def _discover() -> None:
    """Import what declares methods, once.

    This is where a room below `passes` reaches up to it: the folders are scanned as data, so that adding a file is all
    it takes to add a method. It happens when the first recipe is read, not when qexport is imported.
    """
    global _discovered
    if _discovered:
        return
    _discovered = True  # before it is: what is imported may ask for methods
    try:
        for kind in KINDS:
            import_folder(f"qexport.passes.{kind}")
        import_plugins(ENTRY_POINTS, "methods")
    except BaseException:
        _discovered = False
        raise
