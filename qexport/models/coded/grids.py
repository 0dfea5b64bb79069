"""Grids of integers as checkpoints have them, of any number of bits and any group, in the formats that have kernels.

Nothing is rounded: fewer bits go into the next wider format, and a group that no kernel takes becomes several with the
same scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import CaptureError, RecipeError
from ...quant.formats import GROUP_SIZES, QuantizedWeight, Scheme
from .base import Order

# What is said of linears whose inputs the checkpoint rounds in a way that no kernel does.
FLOAT_INPUTS = ", but inputs stay float: no kernel takes them as the config has them"
_WIDER = {1: 2, 2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


@dataclass(frozen=True)
class StoredGrid:
    """Codes (code - zero point) * scale of a weight [N, K] in a checkpoint.

    Attributes:
        bits: of a code.
        group: input features to a scale; K for one scale for each output feature.
        symmetric: every zero point is the middle, 2^(bits - 1), of codes that count from 0.
        columns: K.
    """

    bits: int
    group: int
    symmetric: bool
    columns: int

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group)

    def container(self, inputs: str = "") -> tuple[Scheme | None, str]:
        """The scheme that holds these codes, None for none, and how it does or why none does.

        Args:
            inputs: how 8-bit inputs get their scales, "dyn" (each token its own) or "static"; empty for float ones.
        """
        scheme, kept = self._weights_alone()
        if scheme is None or not inputs:
            return scheme, kept
        asym = "" if self.symmetric else "_asym"
        group = f"_g{scheme.weight.group_size}" if scheme.weight.group_size > 0 else ""
        try:
            return Scheme.parse(f"w{scheme.weight.bits}a8{group}{asym}_{inputs}"), kept
        except RecipeError:
            return scheme, f"{kept}, but inputs stay float: no integer product takes such weights"

    def order(self, group_of: Tensor, place: str) -> Order | None:
        """The input features sorted by their groups; None where they are.

        Args:
            group_of: int64 [K], the group of each input feature; place: name of that tensor.

        Raises:
            CaptureError: groups are not of one size.
        """
        in_order = torch.arange(self.columns) // self.group
        if self.groups == 1 or torch.equal(group_of, in_order):
            return None
        features = torch.argsort(group_of, stable=True)
        if not torch.equal(group_of[features], in_order):
            raise CaptureError(
                f"has groups of sizes other than {self.group}, which no kernel supports", place=place,
                remedy="Export the float model that it was made from",
            )  # fmt: skip
        return Order(features)

    def _weights_alone(self) -> tuple[Scheme | None, str]:
        """The same with float inputs."""
        asym, bits = "" if self.symmetric else "_asym", _WIDER.get(self.bits)
        if bits is None:
            return None, f"no kernel takes codes of {self.bits} bits, so that it becomes float"
        if self.groups == 1 and bits != 2:
            return Scheme.parse(f"w{bits}a16_pc{asym}"), self._kept(bits, self.group)
        size = next((g for g in reversed(GROUP_SIZES) if self.group % g == 0), None)
        if size is None:
            return None, f"no kernel takes groups of {self.group}, so that it becomes float"
        scheme, why = Scheme.parse(f"w{bits}a16_g{size}{asym}").fit(self.columns)
        if scheme is None:
            return None, f"{why}, so that it becomes float"
        return scheme, self._kept(bits, scheme.weight.group_size)

    def _kept(self, bits: int, size: int) -> str:
        changed = [f"codes of {self.bits} bits in {4 if bits == 3 else bits}"] if self._widened(bits) else []
        if self.group != size:
            changed.append(f"groups of {self.group} as groups of {size} with the same scale")
        return ", ".join(changed) or "as stored"

    def _widened(self, bits: int) -> bool:
        """Groups of 3 bits have no more in the file, see `quant.planes`."""
        return bits != self.bits or bits == 3 and self.groups == 1

    def weight(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> QuantizedWeight:
        """The weight in the format of its container.

        Args:
            codes: uint8 [N, K], counting from 0.
            scale: [N, groups]; of any floating dtype.
            zero_point: uint8 [N, groups]; None where the grid is symmetric.
            scheme: of `container`.
        """
        fmt = scheme.weight
        if self.symmetric:
            codes = (codes.to(torch.int16) - (1 << (self.bits - 1))).to(torch.int8)
        if fmt.group_size > 0 and fmt.group_size != self.group:
            scale = self._spread(scale, fmt.group_size)
            zero_point = None if zero_point is None else self._spread(zero_point, fmt.group_size)
        zero_point = None if zero_point is None else zero_point.contiguous()
        return QuantizedWeight(codes.contiguous(), scale.float().contiguous(), zero_point, fmt)

    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The float32 weight, for codes that no container holds.

        Args:
            codes: [N, K], counting from 0.
            scale: float32 [N, groups].
            zero_point: [N, groups]; None for the middle.
        """
        at = torch.arange(self.columns) // self.group
        zero = 1 << (self.bits - 1) if zero_point is None else zero_point.float()[:, at]
        return (codes.float() - zero) * scale[:, at]

    def _spread(self, per_group: Tensor, size: int) -> Tensor:
        """Once for each of the smaller groups."""
        return per_group.repeat_interleave(self.group // size, dim=1)[:, : -(-self.columns // size)]
