"""What a number becomes: formats of weights and activations, and the schemes that pair them."""

import re
from dataclasses import dataclass

from ..errors import RecipeError

PER_CHANNEL = 0
PER_TENSOR = -1
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_SCHEME = re.compile(
    r"w(?P<w>\d+)a(?P<a>\d+)(?:_(?P<group>g\d+|pc|pt))?(?P<asym>_asym)?(?:_(?P<kind>dyn|static))?(?P<int>_int)?"
)
_CODEBOOK = re.compile(r"(?P<book>nf4|fp4)(?:_g(?P<group>\d+))?(?P<double>_dq)?")
_EXAMPLES = "Schemes are w4a16_g32, w4a16_g128_asym, w3a16_g64, w8a8_dyn, w8a8_static, w4a8_g128_int, nf4 and the like"


@dataclass(frozen=True)
class WeightFormat:
    """A grid for the weight of a linear, [out_features, in_features].

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: how many consecutive input features share one scale; PER_CHANNEL (0): one scale for each output
            feature; PER_TENSOR (-1): one scale.
        symmetric: signed codes around zero; otherwise unsigned codes with a zero point, zero always representable.
        codebook: "nf4" or "fp4": codes are indices of a table of 16 values in [-1, 1]; None is an integer grid.
        double_quant: the scales of a codebook are themselves rounded to 8 bits (arXiv 2305.14314).
    """

    bits: int
    group_size: int = PER_CHANNEL
    symmetric: bool = True
    codebook: str | None = None
    double_quant: bool = False

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def stored_bits(self) -> int:
        """Bits of a code in the file: 3-bit codes are kept in 4, because no kernel reads them denser."""
        return 4 if self.bits == 3 else self.bits

    def groups(self, in_features: int) -> int:
        """Number of scales along the input features; the last group may be a part of one."""
        return 1 if self.group_size in (PER_CHANNEL, PER_TENSOR) else -(-in_features // self.group_size)


@dataclass(frozen=True)
class ActivationFormat:
    """A symmetric integer grid for the input of a linear.

    Attributes:
        kind: "static" (one calibrated scale for the tensor) or "dynamic" (one scale per token, taken when it runs).
        bits: 8, or 4: 4-bit codes in int8 tensors, the numbers of W4A4 at the speed of W4A8.
    """

    kind: str
    bits: int = 8

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class Scheme:
    """A weight format and an activation format (None: float), under the name a user writes.

    Attributes:
        expand: weights are stored in groups of few bits and expanded, when the file is loaded, to int8 with one scale
            per output channel, so that the product with integer activations is one integer matmul.
    """

    name: str
    weight: WeightFormat
    activation: ActivationFormat | None
    expand: bool = False

    @property
    def integer(self) -> bool:
        """Whether the product is one integer matmul: both sides integers, no scale inside the sum."""
        return self.activation is not None and (self.expand or self.weight.group_size in (PER_CHANNEL, PER_TENSOR))

    @property
    def table(self) -> bool:
        """Whether rows of such a weight can be looked up: integer codes in groups, and activations in float."""
        return self.activation is None and self.weight.codebook is None and self.weight.group_size > 0

    @classmethod
    def parse(cls, name: str) -> "Scheme":
        """Read `w{2|3|4|8}a{16|8|4}[_g{16..1024}|_pc|_pt][_asym][_dyn|_static][_int]` or `{nf4|fp4}[_g{16..}][_dq]`.

        Case does not matter. Integer activations need `_dyn` (per token) or `_static` (per tensor); `_dyn` is what
        plain `w4a8` means. Without a group, weights have one scale per output channel. `_int` expands weights in
        groups to int8 per channel when the file is loaded. `_dq` rounds the scales of nf4 and fp4 to 8 bits.

        Raises:
            RecipeError: unknown name, or a combination that no target runs.
        """
        if match := _CODEBOOK.fullmatch(name.lower()):
            size = _group_size(name, match["group"] or "64")
            return cls(name.lower(), WeightFormat(4, size, True, match["book"], bool(match["double"])), None)
        match = _SCHEME.fullmatch(name.lower())
        if match is None:
            raise RecipeError(f"unknown scheme {name!r}", remedy=_EXAMPLES)
        bits, act, group = int(match["w"]), int(match["a"]), match["group"]
        if bits not in (2, 3, 4, 8) or act not in (4, 8, 16):
            raise RecipeError(
                f"scheme {name!r} asks for {bits}-bit weights and {act}-bit activations", remedy=_EXAMPLES
            )
        size = {None: PER_CHANNEL, "pc": PER_CHANNEL, "pt": PER_TENSOR}.get(group)
        if size is None:
            size = _group_size(name, group[1:])
        if act == 16 and (match["kind"] or match["int"]):
            what = match["kind"] or "int"
            raise RecipeError(f"scheme {name!r} quantizes no activations, so {what.strip('_')} means nothing")
        weight = WeightFormat(bits, size, match["asym"] is None)
        kind = {"dyn": "dynamic", "static": "static", None: "dynamic"}[match["kind"]]
        activation = None if act == 16 else ActivationFormat(kind, act)
        scheme = cls(name.lower(), weight, activation, match["int"] is not None)
        _check(scheme)
        return scheme


def _group_size(name: str, digits: str) -> int:
    if int(digits) not in GROUP_SIZES:
        listed = ", ".join(map(str, GROUP_SIZES[:-1]))
        raise RecipeError(f"scheme {name!r} has groups of {digits}", remedy=f"Use {listed} or {GROUP_SIZES[-1]}")
    return int(digits)


def _check(scheme: Scheme) -> None:
    """Refuse what no target runs."""
    weight, name = scheme.weight, scheme.name
    whole = weight.group_size in (PER_CHANNEL, PER_TENSOR)
    if scheme.expand and whole:
        raise RecipeError(f"scheme {name!r}: without groups there is nothing to expand", remedy="Leave out _int")
    if weight.bits == 2 and whole and scheme.activation is None:
        raise RecipeError(f"scheme {name!r}: 2-bit weights need groups", remedy="Use w2a16_g64 or w2a16_g128")
    if scheme.activation is None:
        return
    if weight.bits == 2:
        raise RecipeError(f"scheme {name!r}: 2-bit weights take float activations", remedy="Use w2a16_g64")
    if weight.bits == 8 and not (whole and weight.symmetric) or whole and not weight.symmetric:
        raise RecipeError(
            f"scheme {name!r}: an 8-bit integer matmul takes symmetric weights with one scale per output channel",
            remedy="Use w8a8_dyn or w8a8_static" if weight.bits == 8 else "Use w4a8, or groups: w4a8_g128_asym",
        )
    if scheme.activation.bits == 4 and not scheme.integer:
        raise RecipeError(
            f"scheme {name!r}: 4-bit activations need an integer matmul", remedy="Use w4a4 or w4a4_g128_int"
        )
