"""Next-token distributions of the float model and the deployed one, window by window."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..artifact.manifest import Manifest
from ..errors import InputError
from ..progress import StageProgress, no_stage_progress
from ..quant.metrics import (
    all_finite,
    by_stretch,
    kl_divergence,
    nll,
    separation,
    top1_agreement,
    top_k_agreement,
    top_two_margin,
)
from ..runtime.decoder import open_decoder
from .bootstrap import standard_error
from .report import Logits, MarginBin, WindowScores, WorstToken

_STRETCHES = 64  # of a window, at most
_MARGINS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # bounds of what is counted together
_CONTEXT = 24  # tokens shown in front of another


def check_all_logits(manifest: Manifest, folder: Path) -> None:
    """Refuse an export whose logits are those of the last token only: there is too little to compare.

    Raises:
        InputError: as said.
    """
    if manifest.settings.get("logits") == "last":
        raise InputError(
            "gives the logits of the last token only, and a comparison needs those of every token", place=str(folder),
            remedy="Export it once more with logits all; everything else is the same",
        )  # fmt: skip


def deployed_logits(
    folder: Path,
    manifest: Manifest,
    length: int,
    *,
    steps: int = 0,
    threads: int | None = None,
    provider: str | None = None,
) -> Callable[[Tensor], Tensor]:
    """A function from token ids [S], S at most `length`, to the export's logits, float32 [S, vocabulary].

    A file that computes the logits of the last token alone is run token by token, which is slow.

    Args:
        steps: the last tokens, up to half of a text, that come one at a time, as in generation; 0: all in one run.

    Raises:
        InputError: the export gives the logits of the last token only.
        RuntimeProblem: ONNX Runtime refuses the model or does not have the provider.
    """
    check_all_logits(manifest, folder)
    decoder = open_decoder(folder, manifest, threads=threads, provider=provider, max_length=length)

    def run(ids: Tensor) -> Tensor:
        decoder.reset()
        tokens, prompt = ids[None].numpy(), len(ids) - min(steps, len(ids) // 2)
        logits = decoder.run(tokens[:, :prompt])[0]
        if len(logits) < prompt:
            decoder.reset()
            logits, prompt = decoder.run(tokens[:, :1])[0], 1
        found = [torch.tensor(logits, dtype=torch.float32)]  # a copy: the next run may write into its memory
        for i in range(prompt, len(ids)):
            found.append(torch.tensor(decoder.run(tokens[:, i : i + 1])[0], dtype=torch.float32))
        return torch.cat(found) if len(found) > 1 else found[0]

    return run


class Outputs(Protocol):
    """Outputs of the float model by batch, see `FloatOutputs`."""

    def outputs(self, batch: int) -> dict[str, Tensor]: ...


def compare_logits(
    reference: Outputs,
    windows: Tensor,
    deployed: Callable[[Tensor], Tensor],
    progress: StageProgress = no_stage_progress,
    *,
    decode: Callable[[list[int]], str] | None = None,
) -> Logits:
    """Compare the models on texts; both see each window alone, and the logits of one window are in memory at a time.

    Args:
        reference: the float model on these windows.
        windows: int64 [n, S].
        deployed: see `deployed_logits`.
        decode: the text of token ids; None where there is no tokenizer.
    """
    likeliest, margins = [], []
    kl, agree, agree5, costs, float_costs, broken = [], [], 0.0, [], [], 0
    for index, ids in enumerate(windows):
        progress("windows", index, len(windows))
        # What follows the last token is not in the text.
        want, got, targets = reference.outputs(index)["logits"][0, :-1], deployed(ids)[:-1], ids[1:]
        finite = all_finite(got)
        kl.append(kl_divergence(want, got))
        margins.append(top_two_margin(want))
        likeliest.append(torch.stack([want.argmax(-1), got.argmax(-1)], 1))
        agree.append((top1_agreement(want, got) & finite).double())
        agree5 += float((top_k_agreement(want, got, 5) * finite).sum())
        float_costs.append(nll(want, targets))
        costs.append(nll(got, targets))
        broken += int((~finite).sum())
    progress("windows", len(windows), len(windows))
    divergence, alike = torch.cat(kl), torch.stack(agree)
    tokens = len(divergence)
    farthest = None
    if decode is not None and not broken:
        farthest = _farthest(windows, torch.stack(kl), torch.stack(likeliest), decode)
    return Logits(
        windows=len(windows), window=windows.shape[1], tokens=tokens,
        kl_mean=float(divergence.mean()),
        kl_median=float(divergence.median()) if not broken else None,
        kl_p99=float(divergence.quantile(0.99)) if not broken else None,
        top1_agreement=float(alike.mean()),
        float_perplexity=float(torch.cat(float_costs).mean().exp()),
        perplexity=float(torch.cat(costs).mean().exp()),
        nonfinite_tokens=broken,
        top5_agreement=agree5 / tokens,
        kl_by_position=tuple(by_stretch(torch.stack(kl), _STRETCHES).tolist()),
        farthest=farthest,
        **_over_margins(torch.cat(margins), alike.flatten() == 0),
        **_over_windows(*(torch.stack(rows).mean(1) for rows in (kl, costs, float_costs, agree))),
    )  # fmt: skip


def _over_margins(margin: Tensor, differ: Tensor) -> dict[str, Any]:
    """What `Logits` has of margins [tokens] of the float model and of whether [tokens] the deployed one differs."""
    bins = []
    for least, most in pairwise(_MARGINS):
        there = (margin >= least) & ((margin < most) | (most == 1))
        if count := int(there.sum()):
            share = float(differ[there].double().mean())
            bins.append(MarginBin(least=least, most=most, tokens=count, differ=share))
    return {"by_margin": tuple(bins), "margin_separates": separation(margin, differ)}


def _over_windows(kl: Tensor, nll: Tensor, float_nll: Tensor, top1: Tensor) -> dict[str, Any]:
    """What `Logits` has of means [n] over the tokens of each window."""
    scores = WindowScores.model_validate(
        {name: column.tolist() for name, column in (("kl", kl), ("nll", nll), ("float_nll", float_nll), ("top1", top1))}
    )
    return dict(
        by_window=scores,
        kl_error=standard_error(kl[:, None], lambda means: means[:, 0]),
        perplexity_error=standard_error(nll[:, None], lambda means: means[:, 0].exp()),
        relative_perplexity_error=standard_error((nll - float_nll)[:, None], lambda means: means[:, 0].exp()),
        top1_error=standard_error(top1[:, None], lambda means: means[:, 0]),
    )


def _farthest(windows: Tensor, kl: Tensor, likeliest: Tensor, decode: Callable[[list[int]], str]) -> WorstToken:
    """The largest KL [n, S - 1], with both models' likeliest tokens [n, S - 1, 2] there."""
    window, before = divmod(int(kl.argmax()), kl.shape[1])
    wanted, found = likeliest[window, before].tolist()
    ids, token = windows[window].tolist(), before + 1
    return WorstToken(
        window=window, token=token, kl=float(kl[window, before]),
        context=decode(ids[max(token - _CONTEXT, 0) : token]), text=decode([ids[token]]),
        float_likeliest=decode([wanted]), likeliest=decode([found]),
    )  # fmt: skip
