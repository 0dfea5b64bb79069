"""What an export gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from ..artifact.manifest import Manifest
from ..formatting import html_table, megabytes
from ..models.agreement import ReaderAgreement
from ..plan.convolution_plan import ConvolutionPlan
from ..plan.embedding_plan import EmbeddingPlan
from ..plan.linear_plan import LinearPlan


@dataclass(frozen=True, repr=False)
class ExportResult:
    """What an export wrote.

    Of a model in several parts (an encoder-decoder, a model of pictures and text) it says what holds for all together:
    what they list stands one after the other, and the manifest has the linears, sizes and blocks of all; session
    entries and settings are in those of the parts.

    Attributes:
        folder: the output folder.
        manifest: what is in it.
        plan: the decision for every linear, in order.
        seconds: wall time by stage.
        calibration: what the statistics were taken on, or why there was nothing to take.
        embeddings: the decision for every table of token embeddings.
        convolutions: the decision for every convolution, in order.
        dense: mixtures of experts that compute every expert for every token, and why.
        rarely_chosen: linears of experts that few calibration tokens chose, and how many did.
        unseen: by name of the linear, the share of its input features that calibration never made active, if any.
        warnings: sentences about what may hurt, though it was done as asked.
        kept: files that the replaced folder held and no export wrote: they are in the new one, under these names.
        reference: how far the captured float graph is from a witness that reads the model itself.
        codes: what became of codes that the checkpoint holds; empty where its weights are float or became float.
        parts: what was written of each part, by its name: of an encoder-decoder "encoder" and "decoder", of a model of
            pictures and text "vision", "embedding" and "decoder"; empty for other models.
    """

    folder: Path
    manifest: Manifest
    plan: list[LinearPlan]
    seconds: dict[str, float] = field(default_factory=dict)
    calibration: str = ""
    embeddings: list[EmbeddingPlan] = field(default_factory=list)
    convolutions: list[ConvolutionPlan] = field(default_factory=list)
    dense: Mapping[str, str] = field(default_factory=dict)
    rarely_chosen: Mapping[str, str] = field(default_factory=dict)
    unseen: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    kept: list[str] = field(default_factory=list)
    reference: ReaderAgreement = field(default_factory=ReaderAgreement)
    codes: str = ""
    parts: Mapping[str, "ExportResult"] = field(default_factory=dict)

    def __repr__(self) -> str:
        quantized = sum(p.scheme is not None for p in self.plan)
        size = megabytes(self.manifest.bytes.get("model", 0))
        linears = f"{quantized} of {len(self.plan)} linears quantized"
        return f"<ExportResult {self.folder}: {size} for {self.manifest.target}, {linears}>"

    def _repr_html_(self) -> str:
        """For notebooks: the same, and what takes how many bytes."""
        parts = [(name.replace("_", " "), megabytes(size)) for name, size in self.manifest.bytes.items() if size]
        return f"<p>{escape(repr(self))}</p>" + html_table(("part", "size"), parts)
