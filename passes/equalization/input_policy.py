"""Passes that decide the format of each activation by its calibrated range: what others may ask them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ...graph.sites import FoldSite


@dataclass(frozen=True)
class Decision:
    """What a policy does with one activation.

    Attributes:
        kind: of its format, "static" or "dynamic".
        equalize: whether its channels are equalized first.
        why: how its range compares with the bounds, such as "<= 15", and what stands in the way of an equalization.
    """

    kind: str
    equalize: bool
    why: str

    @property
    def what(self) -> str:
        """The decision in words."""
        if self.equalize:
            return "equalized, static per-tensor"
        return "static per-tensor" if self.kind == "static" else "dynamic per-token"

    def sentence(self, reach: float) -> str:
        """The decision about a range, with its reason."""
        return f"range {reach:.4g} {self.why}: {self.what}"


class InputPolicy(ABC):
    """A pass that chooses formats of activations by their ranges."""

    @property
    @abstractmethod
    def rule(self) -> str:
        """How it decides, in words: what stands for a decision until ranges are known."""

    @abstractmethod
    def why_left(self, site: FoldSite) -> str:
        """Why the policy has no say at a site; empty where it decides."""

    @abstractmethod
    def decision(self, site: FoldSite, reach: float) -> Decision:
        """The decision about a site whose value reaches this magnitude."""
