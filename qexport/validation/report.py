"""What a validation found, as data: the key "validation" of report.json."""

import math
from html import escape
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..formatting import html_table
from ..models.agreement import ReaderAgreement

FORMAT: Final = 1
HALF = "float16 in PyTorch"  # name of a `Reference`


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Finite = Annotated[float | None, AfterValidator(_finite)]
"""A number; null in place of an infinity or NaN, which JSON does not have."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ValueComparison(_Frozen):
    """One value of the deployed model beside the same value of the float model.

    Attributes:
        name: of the linear, the block or the output.
        block: where it is.
        scheme: of a quantized linear, else empty.
        sqnr_db: signal to quantization noise in dB, the errors of everything in front included; null where the values
            are equal (max_abs_error is 0) or not finite (max_abs_error is null).
        own_sqnr_db: of the errors made here alone: the float linear (or block) is given what the deployed one is given.
            This is what finds the layer that broke.
        cosine: of the angle between the two values.
        max_abs_error: largest absolute difference; null when the deployed value holds NaN or Inf.
        equal_share: of an output of integers or truth values, the share of its elements that are equal, 0 to 1, in the
            place of the other measures; null of floats.
        choices: how often an output decides something: rows, tokens or pixels of which both models choose a class, or
            numbers of which they say yes or no; null of outputs that decide nothing.
        same_choice: the share of them for which both decide the same, 0 to 1.
        choice_kl: the mean KL of the deployed classes to the float ones, in nats, over softmaxes of both.
        row_cosine: of an embedding, the mean cosine of each row to the float one.
        rank_correlation: Spearman's, of the scores of all rows, or of the similarities of all pairs of embeddings.
        rescaled: smoothing may have divided the output channels of this linear by factors that its reader takes back;
            it is compared up to one factor for each channel, and an error that is such a factor shows in its reader.
        bytes: of a linear, what it takes in the file.
        bits: of them for each weight.
        kernel: operator that computes a linear in the optimized graph.
        provider: where that runs. Empty where it is not known.
        time_share: of a linear's operators in the time of all kernels, 0 to 1, over the prompt that layers are compared
            on.
        step_time_share: the same for steps of one token behind it. Linears that are one product share its time by their
            columns. Null where it was not measured: of models without text there are no steps.
        branch_gain_db: by how much a linear's low-rank branch lowers the error of its weight.
        fault: what is wrong with a linear that rounding does not explain, in words; empty where nothing is.
        kl_cost: what the linear's own error adds to the mean KL of the logits, in nats a token, by the Fisher metric of
            the float model (qexport/calibrate/fisher.py): an estimate for all linears from one pass forward and back.
    """

    name: str
    block: str = ""
    scheme: str = ""
    sqnr_db: Finite = None
    own_sqnr_db: Finite = None
    cosine: Finite = None
    max_abs_error: Finite = None
    equal_share: Finite = None
    choices: int | None = None
    same_choice: Finite = None
    choice_kl: Finite = None
    row_cosine: Finite = None
    rank_correlation: Finite = None
    rescaled: bool = False
    bytes: int | None = None
    bits: Finite = None
    kernel: str = ""
    provider: str = ""
    time_share: Finite = None
    step_time_share: Finite = None
    branch_gain_db: Finite = None
    fault: str = ""
    kl_cost: Finite = None


class Unfused(_Frozen):
    """A planned linear or convolution that did not become its kernel.

    Attributes:
        found: the operator there instead, null where there is none.
    """

    name: str
    expected: str
    found: str | None


class Placement(_Frozen):
    """What ONNX Runtime made of the file.

    Attributes:
        provider: the execution provider asked for.
        nodes_per_provider: how many nodes each provider took.
        op_counts: operators of the optimized graph.
        kernels: for each kernel how many planned linears run as it.
        prompt_kernels: the same for prompts, where the file has a branch for them; what is measured is then of prompts.
        unfused: planned linears and convolutions that do not run as planned.
        convolutions: how many are planned.
    """

    provider: str
    nodes_per_provider: dict[str, int]
    op_counts: dict[str, int]
    kernels: dict[str, int]
    prompt_kernels: dict[str, int] = Field(default_factory=dict)
    unfused: tuple[Unfused, ...] = ()
    convolutions: int = 0


class LayerComparison(_Frozen):
    """The comparison value by value.

    Attributes:
        tokens: rows of every value, over the whole batch.
        linears: the quantized linears, in order.
        blocks: what each block hands on, in order.
        attentions: what each attention makes, in order.
        ranges: of the inputs of linears, in order.
        time_by_op: shares of the time of all kernels by operator, the largest first, over the prompt (or the first
            inputs) that layers are compared on.
        step_time_by_op: the same for steps of one token behind it. Empty where they were not measured, as on other
            providers than the CPU.
        sessions: how many were needed to stay within the memory budget.
        moved: linears that ran as another operator while their values were read than they do in the deployed model.
    """

    tokens: int
    linears: tuple[ValueComparison, ...]
    blocks: tuple[ValueComparison, ...]
    sessions: int
    moved: tuple[Unfused, ...] = ()
    attentions: tuple[ValueComparison, ...] = ()
    ranges: tuple["InputRange", ...] = ()
    time_by_op: dict[str, float] = Field(default_factory=dict)
    step_time_by_op: dict[str, float] = Field(default_factory=dict)


class InputRange(_Frozen):
    """What a value that linears read reaches on the validation text.

    Attributes:
        block: where it is.
        linears: its readers.
        float_absmax: largest magnitude in the float model.
        absmax: the same in the deployed one, after smoothing.
        float_spread: largest magnitude of a channel over the median channel's, in the float model.
        spread: the same in the deployed one.
        clipped: share of the deployed elements outside of the range of the static scale; null where there is none.
        reach: largest magnitude within that range.
    """

    block: str
    linears: tuple[str, ...]
    float_absmax: Finite
    absmax: Finite
    float_spread: Finite
    spread: Finite
    clipped: Finite = None
    reach: Finite = None


class Activation(_Frozen):
    """A quantized activation, as the export left it.

    Attributes:
        block: where it is.
        linears: the products that read it.
        what: how it is quantized.
        bits: of its codes.
        kernel: the share of its elements that become zero on the calibration data (CrossQuant's quantization kernel,
            arXiv 2410.07505); null where not measured.
        kernel_without_zeros: the same without those that are zero anyway.
    """

    block: str
    linears: tuple[str, ...]
    what: str
    bits: int
    kernel: Finite = None
    kernel_without_zeros: Finite = None


class WorstToken(_Frozen):
    """The place where the prediction moved most.

    Attributes:
        window: in which the token is that was predicted, from 0.
        token: its number in there, from 0.
        kl: of its prediction.
        context: the text before it, its last 24 tokens.
        text: the token in the text.
        float_likeliest: what the float model finds likeliest instead.
        likeliest: what the deployed one does.
    """

    window: int
    token: int
    kl: float
    context: str
    text: str
    float_likeliest: str
    likeliest: str


class MarginBin(_Frozen):
    """Tokens that the float model is about as sure of.

    Attributes:
        least, most: of the margin, the probability of its likeliest token minus that of the second one.
        tokens: how many have such a margin.
        differ: share of these for which the deployed model finds another token likeliest.
    """

    least: float
    most: float
    tokens: int
    differ: float


class WindowScores(_Frozen):
    """Means over the predicted tokens of each window, in order, for standard errors and paired tests.

    Attributes:
        kl: as in `Logits`; null where it is not finite. nll, float_nll: negative log-likelihood of the text by the
            deployed model and by the float one.
        top1: share of tokens with the same likeliest one.
    """

    kl: tuple[Finite, ...]
    nll: tuple[Finite, ...]
    float_nll: tuple[Finite, ...]
    top1: tuple[float, ...]


class Logits(_Frozen):
    """Next-token distributions of the float model and the deployed one. Logarithms are natural.

    Windows do not overlap, and each is read alone, cache empty: its first token (where the tokenizer begins every text
    with one, that one) is given and not predicted, and each other token is predicted from those before it in its
    window. Perplexities with a sliding window or a longer context are lower, and not to be compared with these.

    Attributes:
        windows: number of texts.
        window: tokens in each.
        tokens: predicted ones, windows * (window - 1).
        kl_mean: of KL(float || quantized), over tokens.
        kl_median: the same.
        kl_p99: the same, its 99th percentile.
        top1_agreement: share of tokens for which both find the same one likeliest.
        top5_agreement: mean share of the float model's five likeliest tokens that are among the deployed one's five.
        kl_by_position: mean KL over windows for at most 64 stretches of equal length along the window, from its start;
            the last may be shorter.
        by_margin: see `MarginBin`; those without tokens are left out.
        margin_separates: how often, of a token for which both models differ and one for which they agree, the float
            model's margin is smaller at the first: 0.5 where it says nothing, 1 where it says all. Null where there are
            not both.
        farthest: see its class; null without a tokenizer, and for references.
        float_perplexity: exp of the mean negative log-likelihood of the text's tokens, of the float model.
        perplexity: of the deployed one.
        nonfinite_tokens: tokens whose deployed logits hold NaN or Inf; when there are any the measures are null.
        by_window: see its class; null in old reports.
        kl_error: standard error of kl_mean, by a bootstrap over windows as the following ones.
        perplexity_error: of perplexity.
        top1_error: of top1_agreement.
        relative_perplexity_error: of perplexity / float_perplexity, whose two change together from text to text. Null
            with one window.
    """

    windows: int
    window: int
    tokens: int
    kl_mean: Finite
    kl_median: Finite
    kl_p99: Finite
    top1_agreement: float
    float_perplexity: Finite
    perplexity: Finite
    nonfinite_tokens: int = 0
    top5_agreement: float | None = None
    kl_by_position: tuple[Finite, ...] = ()
    by_margin: tuple[MarginBin, ...] = ()
    margin_separates: Finite = None
    farthest: WorstToken | None = None
    by_window: WindowScores | None = None
    kl_error: Finite = None
    perplexity_error: Finite = None
    relative_perplexity_error: Finite = None
    top1_error: Finite = None

    @property
    def relative_perplexity(self) -> float | None:
        """Perplexity over the float model's."""
        if self.perplexity is None or not self.float_perplexity:
            return None
        return self.perplexity / self.float_perplexity


class GradedMeasure(_Frozen):
    """A measure of quality with the grade that it alone would give.

    Attributes:
        measure: its name.
        value: null where it is not finite.
        error: standard error of value, where it is known.
        limit: how far the grade goes; null for the worst one.
    """

    measure: str
    value: Finite
    error: Finite = None
    grade: str
    limit: Finite = None


class Quality(_Frozen):
    """How good the export is, whatever it was planned to be; see `quality.GRADES` for the limits.

    Attributes:
        grade: the worst of those of the measures.
        tone: "good", "middle" or "bad", for colours.
        sentence: the grade and why, in words.
        measures: see their class.
    """

    grade: str
    tone: Literal["good", "middle", "bad"]
    sentence: str
    measures: tuple[GradedMeasure, ...]


class Gate(_Frozen):
    """A limit that a validation was asked to keep.

    Attributes:
        option: as the command line calls it.
        limit: in the units of value.
        value: what was measured.
        error: its standard error, where it is known.
        passed: value keeps limit; what is not finite does not.
        sentence: all of it in words.
    """

    option: str
    limit: float
    value: Finite
    error: Finite = None
    passed: bool
    sentence: str


class Reference(_Frozen):
    """Another form of the float model beside the float32 one in PyTorch.

    A KL of the export near that of float16 in PyTorch, which nobody calls a worse model, means nothing. Float in ONNX
    Runtime is the float model lowered like the export, without quantization: it proves everything else of the file. The
    last 8 tokens of each window are decoded one by one there.

    Attributes:
        name: "float16 in PyTorch", "float32 in ONNX Runtime" (in the dtype of the export).
        logits: how far it is from float32, on the same windows.
    """

    name: str
    logits: Logits


class Greedy(_Frozen):
    """Greedy continuations of prompts, by the float model and by the deployed one.

    Attributes:
        prompts: how many.
        prompt_tokens: tokens in each.
        new_tokens: how many each model adds at most. The deployed file decodes step by step with its cache.
        agreed: for each prompt, how many tokens both continue alike before they part (new_tokens: they never do).
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    agreed: tuple[int, ...]


class SuggestedOverride(_Frozen):
    """An override of the recipe that buys back error.

    Attributes:
        match: name of the linear.
        scheme: what it should have.
        instead_of: what it has.
        more_bytes: how many it costs.
        kl_gain: by how much the mean KL should fall.
    """

    match: str
    scheme: str
    instead_of: str
    more_bytes: int
    kl_gain: Finite


class WeightRow(_Frozen):
    """One weight of a file that qexport did not write, beside the float one; nothing ran.

    Attributes:
        sqnr_db: of the weight.
        nearest_db: of the nearest codes on the same scales, what rounding costs at least.
        unexplained: share of the error's energy in weights that are off by more than rounding, and what methods add to
            it, moves them. Both null without codes on a grid.
        factors: its input channels carry factors that something in front divides by; they are taken off.
        fault: what is wrong with it, in words; empty where nothing is.
    """

    name: str
    sqnr_db: Finite = None
    nearest_db: Finite = None
    unexplained: Finite = None
    factors: bool = False
    fault: str = ""


class Foreign(_Frozen):
    """A file that qexport did not write.

    Attributes:
        file: its name.
        tool: what it says wrote it.
        matched: how many linears of the float model were found by "values" of their weights, by "names" alone, and by
            "order" alone.
        missing: those that no product of the file computes.
        others: products with codes that are no linear of the float model.
        weights: of every linear found, in order.
        tensors: sentences on gains, biases and embeddings that are not the float model's.
        unfused: sentences on products whose codes become float again at every run, and why.
        notes: sentences on slow kernels, settings that nobody made, and copies.
    """

    file: str
    tool: str
    matched: dict[str, int]
    missing: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    weights: tuple[WeightRow, ...] = ()
    tensors: tuple[str, ...] = ()
    unfused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Sensitivity(_Frozen):
    """Which linears cost the most KL.

    Attributes:
        tokens: of the text that it was measured on.
        kl_mean: of the deployed model on these alone, which is not that of the whole text in `Logits`.
        kl_foretold: the sum of all `ValueComparison.kl_cost`; where it is far from kl_mean, the costs are guesses.
        measured: the fall of kl_mean by name, with the value of that linear alone restored to float in the deployed
            file: of the costliest linears, and of a quantized embedding (by the name of its block). It is measured
            among the errors of all others, so it may be below zero.
        overrides: what buys back the most for each byte, best first.
    """

    tokens: int
    kl_mean: Finite
    kl_foretold: Finite
    measured: dict[str, Finite]
    overrides: tuple[SuggestedOverride, ...] = ()


class Report(_Frozen):
    """The key "validation" of report.json.

    Attributes:
        reference: the float model's name.
        text: what both models read.
        reader: how far the float model, as it was read here, is from a witness that reads it too; null in old reports.
        own_text: the float model wrote the text, or chance did: its perplexity compares with nothing else.
        layers: the comparison value by value.
        logits: that of distributions over next tokens; null for models without text.
        placement: what runs where.
        activations: every quantized activation.
        outputs: for models without text, each output over all inputs.
        references: models beside which a KL means something; empty where they were not asked for.
        greedy: texts of both models, token by token; null where they were not asked for.
        sensitivity: what each linear costs; null where it was not asked for.
        left_out: sentences about what was asked for and not done.
        warnings: sentences of the export about what may hurt on other data.
        quality: how good it is; null in old reports, and where there is nothing to grade.
        gates: limits that were asked for.
        problems: sentences about what has to be repaired; empty when the export does what was planned, which says
            nothing of quality.
        verdict: everything in plain sentences, problems first.
        seconds: wall time by stage.
        foreign: of a file that qexport did not write, how it was read; else null.
        settings: what `validate` was called with, by the names of its options; null: the default of the machine.
        versions: of qexport and of the libraries whose numbers these are.
        parts: of an encoder-decoder, the reports of its "encoder" and "decoder", each on what the float model hands to
            it; empty for other models, and in report.json, as each has its own. Layers, outputs and placement are those
            of both then, and logits and greedy are about what the export writes about whole sources; prompts of
            `greedy` are the tokens that every text begins with.
    """

    format: Literal[1] = FORMAT
    reference: str
    reader: ReaderAgreement | None = None
    text: str
    own_text: bool = False
    layers: LayerComparison
    activations: tuple[Activation, ...] = ()
    logits: Logits | None = None
    outputs: tuple[ValueComparison, ...] = ()
    references: tuple[Reference, ...] = ()
    greedy: Greedy | None = None
    sensitivity: Sensitivity | None = None
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    placement: Placement
    quality: Quality | None = None
    gates: tuple[Gate, ...] = ()
    problems: tuple[str, ...] = ()
    verdict: tuple[str, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    foreign: Foreign | None = None
    parts: dict[str, "Report"] = Field(default_factory=dict)

    def __repr__(self) -> str:
        grade = "no grade" if self.quality is None else f"quality {self.quality.grade}"
        kl = "" if self.logits is None or self.logits.kl_mean is None else f", mean KL {self.logits.kl_mean:.4g}"
        return f"<Report beside {self.reference}: {grade}{kl}, {len(self.problems)} problems; see .verdict>"

    def _repr_html_(self) -> str:
        """For notebooks: the grade and the problems, then the measures."""
        from .formatting import summary_rows  # which reads reports

        said = [*([] if self.quality is None else [self.quality.sentence]), *self.problems]
        lines = "".join(f"<p>{escape(sentence)}</p>" for sentence in said)
        return lines + html_table(("measure", "value", "what it means"), summary_rows(self))

    def as_dict(self) -> dict[str, Any]:
        """What report.json gets: numbers, strings, lists and null."""
        return self.model_dump(mode="json")


def report_schema() -> dict[str, Any]:
    """The JSON schema of a report; its parts are reports too, by reference to `$defs/Report`."""
    schema = Report.model_json_schema()
    return schema["$defs"]["Report"] | {"$defs": schema["$defs"]}
