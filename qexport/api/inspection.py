"""What an export would do, as data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..cost.estimate import Estimate
from ..passes.equalization.input_policy import Decision
from ..plan.convolution_plan import ConvolutionPlan
from ..plan.embedding_plan import EmbeddingPlan
from ..plan.linear_plan import LinearPlan
from ..plan.model_plan import described_embedding


@dataclass(frozen=True)
class Site:
    """A value that linears read, and where a factor for each of its channels can go.

    Attributes:
        block: the block it is in.
        linears: the linears that read it.
        fold: what takes the factor at no cost: "norm" or the name of the linear in front; None where nothing does.
        why: what stands in the way of a fold; empty where there is one.
        range: the largest magnitude of the value in the float model on calibration data; None where none was run, or
            where no linear quantizes the value.
        decision: what a policy of the recipe makes of that range; None where there is none.
    """

    block: str
    linears: tuple[str, ...]
    fold: str | None
    why: str = ""
    range: float | None = None
    decision: Decision | None = None

    @property
    def reason(self) -> str:
        """The decision with its reason, such as "range 12.3 <= 15: static per-tensor"; empty without one."""
        return "" if self.decision is None or self.range is None else self.decision.sentence(self.range)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "block": self.block, "linears": list(self.linears), "fold": self.fold, "why": self.why,
            "range": self.range, "decision": self.decision and self.decision.what, "reason": self.reason,
        }  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """What an export would do.

    Attributes:
        model: what would be exported, as it was given.
        recipe: by its name.
        target: what it would be made for.
        calibrates: whether the export needs calibration data.
        calibration: the data that ranges were taken on; empty when none was run.
        smooths: whether the recipe moves factors from activations into weights.
        linears: the decision for every linear, in order; bytes as in the file of that target.
        activations: by linear name, what becomes of its input, such as "int8 per token".
        slow: by the name of every linear for which the target has several kernels, why the fastest does not take its
            product; empty where it does. Other linears are not in it.
        sites: where factors can go, in order, with ranges and what a policy decides by them.
        attention: of a decoder, "grouped" or "standard" and why; empty for other models.
        cache: of a decoder that keeps keys and values, what: "numbers", and "bytes_a_token"; empty for other models.
        parameters: number of weights, tied ones counted once.
        bytes: of the float model in the target's dtype ("float"), and of the export: "quantized" linears, the
            "embedding" with what an output projection reads of it too, the output projection ("lm_head") and the "rest"
            (norms, linears left in float, rotary tables), "total" being their sum.
        estimate: time, memory and disk that the export is expected to take.
        embeddings: the decision for every table of token embeddings.
        convolutions: the decision for every convolution, in order; their bytes are among the rest.
        warnings: sentences on what a user may not expect of the model's folder.
        adapter: what is merged into the weights; empty where nothing is.
        codes: what becomes of codes that the checkpoint holds; empty where its weights are float or become float.
        parts: of a model in several parts, see `ExportResult`, what an export would do to each, of which this is the
            sum; empty for other models.
    """

    model: str
    recipe: str
    target: str
    calibrates: bool
    calibration: str
    smooths: bool
    linears: tuple[LinearPlan, ...]
    activations: Mapping[str, str]
    slow: Mapping[str, str]
    sites: tuple[Site, ...]
    attention: str
    parameters: int
    bytes: dict[str, int]
    estimate: Estimate
    cache: Mapping[str, Any] = field(default_factory=dict)
    embeddings: tuple[EmbeddingPlan, ...] = ()
    convolutions: tuple[ConvolutionPlan, ...] = ()
    warnings: tuple[str, ...] = ()
    codes: str = ""
    adapter: str = ""
    parts: Mapping[str, "Inspection"] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        found = asdict(
            replace(self, linears=(), sites=(), activations={}, embeddings=(), convolutions=(), slow={}, parts={})
        )
        del found["activations"], found["slow"]
        found["embeddings"] = [described_embedding(e) for e in self.embeddings]
        found["linears"] = [
            {
                "name": p.name, "block": p.block, "shape": list(p.shape), "bytes": p.bytes, "reason": p.reason,
                "scheme": p.scheme.name if p.scheme else "float", "activation": self.activations[p.name],
                "fast": not self.slow[p.name] if p.name in self.slow else None, "slow": self.slow.get(p.name, ""),
            }
            for p in self.linears
        ]  # fmt: skip
        found["convolutions"] = [
            {
                "name": p.name, "block": p.block, "shape": list(p.shape), "bytes": p.bytes, "reason": p.reason,
                "scheme": p.scheme.name if p.scheme else "float",
            }
            for p in self.convolutions
        ]  # fmt: skip
        found["sites"] = [site.as_dict() for site in self.sites]
        found["parts"] = {name: part.as_dict() for name, part in self.parts.items()}
        return found
