"""Comparing an exported encoder-decoder with the float model: part by part, and what it writes about whole sources."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ...artifact.manifest import DECODER, ENCODER
from ...artifact.output import inside
from ...calibrate.data import Prepared, Progress, no_progress
from ...calibrate.encoder_inputs import with_last_token
from ...capture.seq2seq import Parts, capture_seq2seq
from ...errors import InputError
from ...models.source import ModelFolder, open_model
from ...recipe.recipe import CalibrationSpec
from ...runtime.seq2seq import EncoderDecoder, is_seq2seq, open_seq2seq
from ...validation import Report
from ...validation.formatting import number
from ...validation.greedy import alike
from ...validation.logits import compare_logits
from ...validation.reference import FloatOutputs
from ...validation.report import Greedy, Logits
from ...validation.report_store import KEY, keep
from ...validation.text import choose_text
from ..validating import validate
from .sources import Sources, batches_of, load_sources, of_part, write_about

_SEED = 0x5EED0F7E57  # of sources that nobody gave: others than any recipe's
_LAYER_BATCHES = 4  # sources on which values inside the parts are compared


class Seq2SeqReport(BaseModel):
    """What was found.

    Attributes:
        encoder, decoder: of the parts alone, each on what the float model hands to it; they are in the parts' folders.
        sources: what was read; own_sources: chance made them, so that the measures say little.
        logits: the whole export's beside the float model's, on texts that the float model writes about the sources; the
            export reads the sources itself and goes through the texts token by token, with its cache.
        greedy: how far both write the same about a source; prompts are the tokens that every text begins with.
        problems: of both parts; verdict: everything in plain sentences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: Report
    decoder: Report
    sources: str
    own_sources: bool
    logits: Logits
    greedy: Greedy | None
    problems: tuple[str, ...]
    verdict: tuple[str, ...]


def validate_seq2seq(
    folder: str | os.PathLike,
    reference: str | os.PathLike | ModelFolder,
    *,
    text: str | os.PathLike | None = None,
    inputs: Tensor | Sequence[str] | None = None,
    windows: int = 8,
    window: int = 128,
    new_tokens: int = 32,
    threads: int | None = None,
    provider: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> Seq2SeqReport:
    """Compare an export with the float encoder-decoder it was made from, and write the result into report.json.

    Args:
        folder: what `export_seq2seq` wrote; it has to be writable.
        reference: the model that was exported, a Hugging Face id or a folder.
        text: sources: a UTF-8 file or a string; for a model of spectrograms a safetensors file of them. None: tokens or
            numbers at random.
        inputs: the sources themselves instead: texts, or spectrograms [n, bins, frames].
        windows, window: how many sources, and tokens in each.
        new_tokens: that the float model writes about each source, and the export too; 2 or more.
        threads, provider, trust_remote_code, progress: as `validate` takes them.

    Raises:
        InputError: the folder is no export of an encoder-decoder, the reference is another model, or there is nothing
            to read in the text.
        RuntimeProblem: ONNX Runtime refuses a part or does not have the provider.
    """
    folder = Path(folder)
    if not is_seq2seq(folder):
        raise InputError("is no export of an encoder-decoder", place=str(folder))
    if new_tokens < 2:
        raise InputError(f"{new_tokens} new tokens tell nothing", place="new_tokens", remedy="Take 2 or more")
    with inside(folder, "validating"):
        return _validate(
            folder, reference, text, inputs, windows, window, new_tokens, threads, provider, progress, trust_remote_code
        )


def _validate(
    folder: Path, reference, text, inputs, windows: int, window: int, new_tokens: int, threads, provider,
    progress: Progress, trust_remote_code: bool,
) -> Seq2SeqReport:  # fmt: skip
    model = open_model(reference, trust_remote_code=trust_remote_code)
    if not model.config.is_encoder_decoder:
        raise InputError("is no encoder-decoder", place=model.name, remedy="Give the model that was exported")
    progress("capture", model.name, 0, 1)
    parts = capture_seq2seq(model)
    sources = _sources(parts, text, inputs, windows, window, progress)
    progress("text", "the float model writes about the sources", 0, 1)
    written = write_about(parts, sources, new_tokens)
    progress("text", "the float model writes about the sources", 1, 1)
    read = sources.batches[: len(written.batches)]
    reports = [
        validate(
            folder / part, captured, inputs=batches[:_LAYER_BATCHES], threads=threads, provider=provider,
            progress=partial(of_part, progress, part),
        )
        for part, captured, batches in ((ENCODER, parts.encoder, read), (DECODER, parts.decoder, written.batches))
    ]  # fmt: skip
    pair = open_seq2seq(folder, threads=threads, provider=provider)
    logits = _logits(parts, pair, read, written, partial(progress, "logits"))
    greedy = _greedy(parts, pair, read, written, partial(progress, "greedy"))
    problems = tuple(
        f"{part}: {sentence}" for part, report in zip((ENCODER, DECODER), reports, strict=True)
        for sentence in report.problems
    )  # fmt: skip
    report = Seq2SeqReport(
        encoder=reports[0], decoder=reports[1], sources=sources.described, own_sources=sources.own, logits=logits,
        greedy=greedy, problems=problems, verdict=(*problems, *_sentences(sources, logits, greedy)),
    )  # fmt: skip
    keep(folder, KEY, report.model_dump(mode="json", exclude={ENCODER, DECODER}))
    return report


def _sources(parts: Parts, text, inputs, windows: int, window: int, progress: Progress) -> Sources:
    if inputs is None and text is not None and parts.encoder.inputs[0].name == "input_ids":
        chosen = choose_text(parts.encoder, text, windows, window, partial(progress, "text"))
        rows = list(with_last_token(chosen.windows, parts.encoder))
        return Sources(batches_of(parts, rows, 1), chosen.described)
    spec = CalibrationSpec(
        source="random" if text is None else os.fspath(text), samples=windows, sequence_length=window, seed=_SEED,
        batch_size=1,
    )  # fmt: skip
    return load_sources(parts, spec, inputs)


def _logits(parts: Parts, pair: EncoderDecoder, sources: Sequence[dict[str, Tensor]], written: Prepared, progress):
    """Both models on the float model's texts; the export takes them token by token."""
    texts = torch.cat([batch["input_ids"] for batch in written.batches])
    start, waiting = len(pair.habits.start), iter(sources)

    def deployed(ids: Tensor) -> Tensor:
        pair.read({name: tensor.numpy() for name, tensor in next(waiting).items()})
        tokens = ids[None].numpy()
        steps = [tokens[:, :start], *(tokens[:, i : i + 1] for i in range(start, tokens.shape[1]))]
        return torch.cat([torch.tensor(pair.decoder.run(step)[0], dtype=torch.float32) for step in steps])

    reference = FloatOutputs(parts.decoder, written.batches, ("logits",), progress)
    tokenizer = parts.encoder.folder.tokenizer()
    try:
        return compare_logits(reference, texts, deployed, progress, decode=tokenizer and tokenizer.decode)
    finally:
        reference.close()


def _greedy(
    parts: Parts, pair: EncoderDecoder, sources: Sequence[dict[str, Tensor]], written: Prepared, progress
) -> Greedy:
    """Where the float model would part from what the export writes."""
    start = pair.habits.start
    count = written.batches[0]["input_ids"].shape[1] - len(start)
    texts = []
    for index, source in enumerate(sources):
        progress("sources", index, len(sources))
        pair.read({name: tensor.numpy() for name, tensor in source.items()})
        texts.append(torch.tensor(pair.decoder.generate([start], max_new_tokens=count).tokens))
    prompt = torch.tensor([start])
    feeds = [
        batch | {"input_ids": torch.cat([prompt, text[:, :-1]], 1)}
        for batch, text in zip(written.batches, texts, strict=True)
    ]
    reference = FloatOutputs(parts.decoder, feeds, ("logits",), progress)
    try:
        likeliest = [reference.outputs(i)["logits"][0, len(start) - 1 :].argmax(-1) for i in range(len(texts))]
    finally:
        reference.close()
    agreed = tuple(alike(want, got[0]) for want, got in zip(likeliest, texts, strict=True))
    return Greedy(prompts=len(texts), prompt_tokens=len(start), new_tokens=count, agreed=agreed)


def _sentences(sources: Sources, logits: Logits, greedy: Greedy) -> list[str]:
    chance = ["The sources are random: give text of the kind that the model is for"] if sources.own else []
    return [
        f"KL {number(logits.kl_mean)} a token from the float model, and the same token likeliest for "
        f"{100 * logits.top1_agreement:.1f} % of {logits.tokens}",
        f"Both write the same about a source for {np.mean(greedy.agreed):.1f} of {greedy.new_tokens} tokens on average",
        *chance,
    ]
