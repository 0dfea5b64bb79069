"""Calibration text that the model writes itself, so that none has to be found (LLM-QAT, arXiv 2305.17888)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, NumericsError

# (input_ids int64 [b, t], max_new_tokens, generator) -> int64 [b, t + max_new_tokens], the prompt first
Generate = Callable[[Tensor, int, torch.Generator], Tensor]
# (input_ids int64 [b, s], past or None) -> (logits of the last position [b, V], past)
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]

_GREEDY = 4


def continue_text(
    step: Step,
    input_ids: Tensor,
    max_new_tokens: int,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    greedy: int = _GREEDY,
) -> Tensor:
    """Continue prompts: first a few most likely tokens, to find a topic, then sampled ones, for variety.

    Args:
        step: called with the prompt and past None, then with one token [b, 1] and the past it returned.
        input_ids: int64 [b, t].
        generator: on the CPU, where tokens are drawn wherever the logits are.
        temperature: divides the logits of sampled tokens.
        top_k: sample from this many most likely tokens; None: from the whole vocabulary.
        greedy: how many of the first new tokens are the most likely ones.

    Returns:
        int64 [b, t + max_new_tokens] on the device of input_ids. An end-of-text token does not stop a sequence: what
        follows it begins a new text.

    Raises:
        InputError: temperature not above 0, or top_k below 1.
        NumericsError: NaN in the logits.
    """
    if not temperature > 0 or (top_k is not None and top_k < 1):
        raise InputError(f"cannot sample with temperature {temperature} and top_k {top_k}")
    ids, fed, past = input_ids, input_ids, None
    for position in range(max_new_tokens):
        logits, past = step(fed, past)
        logits = logits.float().cpu()
        if logits.isnan().any():
            raise NumericsError("the model's logits hold NaN", place=f"token {ids.shape[1]} of a self-written text")
        drawn = logits.argmax(-1, keepdim=True) if position < greedy else _draw(logits / temperature, top_k, generator)
        fed = drawn.to(ids.device)
        ids = torch.cat([ids, fed], dim=1)
    return ids


def _draw(logits: Tensor, top_k: int | None, generator: torch.Generator) -> Tensor:
    if top_k is None or top_k >= logits.shape[-1]:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)
    best, index = logits.topk(top_k)
    return index.gather(1, torch.multinomial(best.softmax(-1), 1, generator=generator))


def write_text(
    generate: Generate, bos_ids: list[int], n: int, length: int, *, vocab: Tensor, seed: int, batch_size: int = 4
) -> Tensor:
    """Let `generate` write n texts, each from bos_ids and one random token of its own.

    Args:
        generate: see `Generate`.
        bos_ids: what every text of this model begins with; may be empty.
        length: tokens in a text, prompt included.
        vocab: int64 [v], the tokens a text may start with; no two texts start alike while v lasts.
        seed: of the first tokens and of the generator handed on. The texts depend on batch_size too.

    Returns:
        int64 [n, length] on the CPU.

    Raises:
        InputError: n < 1, length too short for the prompt, or generate returned another shape or changed the prompt.
    """
    if n < 1:
        raise InputError(f"{n} samples are too few", remedy="Ask for at least 1")
    if length <= len(bos_ids):
        raise InputError(f"{length} tokens leave no room after the {len(bos_ids)} that begin every text")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(vocab), generator=generator)
    first = vocab[order[torch.arange(n) % len(order)]]
    prompts = torch.cat([torch.tensor(bos_ids, dtype=torch.int64).expand(n, -1), first[:, None]], dim=1)
    texts = []
    for prompt in prompts.split(batch_size):
        ids = generate(prompt, length - prompt.shape[1], generator).cpu().long()
        if ids.shape != (len(prompt), length) or not torch.equal(ids[:, : prompt.shape[1]], prompt):
            raise InputError(
                f"generate returned ids {list(ids.shape)} for a prompt of {list(prompt.shape)}",
                remedy=f"It has to return the prompt and what follows it, [{len(prompt)}, {length}]",
            )
        texts.append(ids)
    return torch.cat(texts)
