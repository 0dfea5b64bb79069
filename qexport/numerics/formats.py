"""What a number becomes: formats of weights and activations, and the schemes that pair them."""

import re
from dataclasses import dataclass

from ..errors import RecipeError

PER_CHANNEL = 0
PER_TENSOR = -1
_SCHEME = re.compile(r"w(?P<w>\d+)a(?P<a>\d+)(?:_(?P<group>g\d+|pc|pt))?(?P<asym>_asym)?(?:_(?P<kind>dyn|static))?")


@dataclass(frozen=True)
class WeightFormat:
    """An integer grid for the weight of a linear, [out_features, in_features].

    Attributes:
        bits: 4 or 8.
        group_size: how many consecutive input features share one scale; PER_CHANNEL (0): one scale for each output
            feature; PER_TENSOR (-1): one scale.
        symmetric: signed codes around zero; otherwise unsigned codes with a zero point, zero always representable.
    """

    bits: int
    group_size: int = PER_CHANNEL
    symmetric: bool = True

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def groups(self, in_features: int) -> int:
        """Number of scales along the input features.

        Raises:
            RecipeError: in_features is not a multiple of group_size.
        """
        if self.group_size in (PER_CHANNEL, PER_TENSOR):
            return 1
        if in_features % self.group_size:
            raise RecipeError(f"{in_features} input features do not divide into groups of {self.group_size}")
        return in_features // self.group_size


@dataclass(frozen=True)
class ActivationFormat:
    """An 8-bit symmetric grid for the input of a linear.

    Attributes:
        kind: "static" (one calibrated scale for the tensor) or "dynamic" (one scale per token, taken when it runs).
        bits: 8.
    """

    kind: str
    bits: int = 8

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class Scheme:
    """A weight format and an activation format (None: float), under the name a user writes."""

    name: str
    weight: WeightFormat
    activation: ActivationFormat | None

    @classmethod
    def parse(cls, name: str) -> "Scheme":
        """Read `w{4|8}a{16|8}[_g{16..256}|_pc|_pt][_asym][_dyn|_static]` (case does not matter).

        8-bit activations need `_dyn` (per token) or `_static` (per tensor); `_dyn` is what plain `w4a8` means. Without
        a group, weights have one scale per output channel.

        Raises:
            RecipeError: unknown name, or a combination that no target runs.
        """
        match = _SCHEME.fullmatch(name.lower())
        remedy = "Schemes are w4a16_g32, w4a16_g128_asym, w8a16_g32, w8a8_dyn, w8a8_static, w4a8_g128 and the like"
        if match is None:
            raise RecipeError(f"unknown scheme {name!r}", remedy=remedy)
        bits, act = int(match["w"]), int(match["a"])
        if bits not in (4, 8) or act not in (8, 16):
            raise RecipeError(f"scheme {name!r} asks for {bits}-bit weights and {act}-bit activations", remedy=remedy)
        group = match["group"]
        size = {None: PER_CHANNEL, "pc": PER_CHANNEL, "pt": PER_TENSOR}.get(group)
        if size is None:
            size = int(group[1:])
            if size not in (16, 32, 64, 128, 256):
                raise RecipeError(f"scheme {name!r} has groups of {size}", remedy="Use 16, 32, 64, 128 or 256")
        if act == 16 and match["kind"]:
            raise RecipeError(f"scheme {name!r} quantizes no activations, so _{match['kind']} means nothing")
        symmetric = match["asym"] is None
        integer = act == 8 and (bits == 8 or size in (PER_CHANNEL, PER_TENSOR))  # no scale inside the sum
        if integer and not (symmetric and size in (PER_CHANNEL, PER_TENSOR)):
            raise RecipeError(
                f"scheme {name!r}: an 8-bit integer matmul takes symmetric weights with one scale per output channel",
                remedy="Use w8a8_dyn or w8a8_static" if bits == 8 else "Use w4a8, or groups: w4a8_g128_asym",
            )
        kind = {"dyn": "dynamic", "static": "static", None: "dynamic"}[match["kind"]]
        return cls(name.lower(), WeightFormat(bits, size, symmetric), ActivationFormat(kind) if act == 8 else None)
