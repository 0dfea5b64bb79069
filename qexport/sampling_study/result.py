"""What a study found, as data: the JSON document that `qexport study -o` writes."""

import json
import os
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..artifact.scratch import write_whole
from ..errors import InputError
from ..validation.report import Finite

FORMAT: Final = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ComparedModel(_Frozen):
    """One of the compared models.

    Attributes:
        name: as in the rows; folder: of the export, empty for the float model.
        runtime: "ONNX Runtime", or "PyTorch" for the float model, whose speed is therefore no measure for an export.
        model_bytes: of the ONNX file and its data; of the float model its weights in float32. This is the size on disk,
            not resident memory, which `qexport bench` measures.
        tokens_per_second: median over all texts of steps a second behind the prompt, without drawing the token.
    """

    name: str
    folder: str
    runtime: str
    model_bytes: int
    tokens_per_second: Finite = None


class StudyRow(_Frozen):
    """One format under one setting: means over prompts and seeds.

    `X_error` is the standard error of X over prompts (each the mean over its seeds), with a single prompt over seeds;
    null where there is one text alone. `X_change` is the mean difference from the float model's text for the same
    prompt and seed. Temperature 0 takes the likeliest token, so its one row, with top_k 0, holds for every top_k.

    Attributes:
        format: name; temperature, top_k (0: off), max_new_tokens: the setting; texts: how many.
        distance: total variation between the distributions that the float model and this format draw from, over the
            tokens of the float model's text, both reading it: the least share of draws that differ. At temperature 0
            the share of tokens whose likeliest successor differs.
        prefix_share: tokens before the first difference from the float model's text for the same random numbers, as a
            share of the longer text; prefix_tokens: the same in tokens.
        token_agreement: share of positions of the longer text where both texts have the same token.
        perplexity: of the text under the float model in float32, given the prompt: exp of the mean over texts of the
            mean negative log-likelihood; perplexity_ratio: to the float model's own texts.
        repetition: share of 4-grams that were in the text before; distinct_1, distinct_2: different tokens and pairs
            over all of them; for texts long enough to have any.
        new_tokens: mean length, which the end of a text may cut short.
        tokens_per_second: median over texts, as in `ComparedModel`; tokens_per_second_spread: interquartile range
            over it.
    """

    format: str
    temperature: float
    top_k: int
    max_new_tokens: int
    texts: int
    distance: Finite
    distance_error: Finite
    prefix_share: Finite
    prefix_share_error: Finite
    prefix_tokens: Finite
    prefix_tokens_error: Finite
    token_agreement: Finite
    token_agreement_error: Finite
    perplexity: Finite
    perplexity_error: Finite
    perplexity_ratio: Finite
    perplexity_ratio_error: Finite
    repetition: Finite
    repetition_error: Finite
    repetition_change: Finite
    repetition_change_error: Finite
    distinct_1: Finite
    distinct_1_error: Finite
    distinct_1_change: Finite
    distinct_1_change_error: Finite
    distinct_2: Finite
    distinct_2_error: Finite
    distinct_2_change: Finite
    distinct_2_change_error: Finite
    new_tokens: Finite
    new_tokens_error: Finite
    tokens_per_second: Finite
    tokens_per_second_spread: Finite


class BestFormat(_Frozen):
    """A format that is worth its size under one setting: every smaller one is clearly further from the float model.

    Attributes:
        temperature, top_k, max_new_tokens: the setting; format: the name; model_bytes: its size.
        distance, distance_error: as in `StudyRow`.
        gain, gain_error: by how much its distance is below that of the next smaller choice; null for the smallest.
    """

    temperature: float
    top_k: int
    max_new_tokens: int
    format: str
    model_bytes: int
    distance: Finite
    distance_error: Finite
    gain: Finite = None
    gain_error: Finite = None


class Study(_Frozen):
    """The whole document.

    Attributes:
        format: of the document.
        reference: name of the float model; its format in the rows is the first of `formats`.
        prompts, seeds, temperatures, top_ks, max_new_tokens: what was varied.
        threads: of ONNX Runtime; null where it chose. provider: asked for; empty where each file's own was taken.
        formats, rows, choices: see their classes.
        conclusions: what to take, and what temperature changes, in sentences made from rows and texts.
        versions: of qexport, onnxruntime, torch, transformers and numpy.
        seconds: wall time.
    """

    format: Literal[1] = FORMAT
    reference: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    temperatures: tuple[float, ...]
    top_ks: tuple[int, ...]
    max_new_tokens: tuple[int, ...]
    threads: int | None = None
    provider: str = ""
    formats: tuple[ComparedModel, ...]
    rows: tuple[StudyRow, ...]
    choices: tuple[BestFormat, ...]
    conclusions: tuple[str, ...]
    versions: dict[str, str] = Field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and null."""
        return self.model_dump(mode="json")

    def save(self, path: str | os.PathLike) -> Path:
        """Write the document as JSON; the file appears whole or not at all.

        Raises:
            InputError: the place cannot be written.
        """
        path = Path(path)
        check_place(path)
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_whole(path, f"{text}\n", "Free some space, or choose another place")
        return path


def check_place(path: Path) -> None:
    """Refuse a file that could not be written: better before minutes of work than behind them.

    Raises:
        InputError: as said.
    """
    if path.is_dir():
        raise InputError("is a folder, and a file is to be written", place=str(path), remedy="Give a file's name")
    if not path.parent.is_dir():
        raise InputError("no such folder", place=str(path.parent), remedy="Make it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError("cannot be written", place=str(path.parent), remedy="Choose a folder you own")
