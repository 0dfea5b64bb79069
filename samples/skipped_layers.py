"""What a draft out of a model's own weights could bring: the model without some of its layers, or with fewer bits.

    python samples/skipped_layers.py MODEL --text text.txt [--texts 3] [--row-cost 0.34] [--dtype bfloat16]

The float model writes the likeliest tokens behind paragraphs of the text ("greedy") and behind paragraphs that stand in
the prompt twice ("copied"). From every place of what it wrote the draft goes on by up to eight tokens, on the keys and
values that the whole model left for what was checked. Of each draft the table says what a token of it costs in tokens
of the whole model, how many tokens were right in a row at each length of drafts, and the best speed that this allows
beside plain decoding: a call that checks k guesses costs 1 + k times the row cost, the guesses k times their own cost.
The cost of a row is `samples/tokens_in_a_step.py`'s; with 0 checking were free, which no kernel is.

Which layers are left out: the last ones ("exit"), the middle ones, every other of the middle ones, and those whose
absence, chosen one after the other, adds least to the KL from the whole model ("chosen"). First and last layer stay but
for "exit". Fewer bits are the upper ones of codes of 4 bits, in groups of 32, of all linears.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from drafts import prompts

NEW, MOST, CHAINS = 96, 8, 16  # tokens written, longest draft, drafts at a time
CHOOSING = 96  # tokens by which layers are chosen
SKIPPED = (2, 4, 8)


@dataclass
class Written:
    """What the whole model wrote: all tokens, where its own begin, and the keys and values of all."""

    ids: torch.Tensor
    start: int
    cache: transformers.DynamicCache


@contextlib.contextmanager
def without(model, skipped: set[int]) -> Iterator[None]:
    """The model without layers: those that stay keep their places in the cache."""
    whole = model.model.layers
    model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(whole) if i not in skipped)
    count, model.config.num_hidden_layers = model.config.num_hidden_layers, len(model.model.layers)
    try:
        yield
    finally:
        model.model.layers, model.config.num_hidden_layers = whole, count


@contextlib.contextmanager
def of_bits(model, bits: int) -> Iterator[None]:
    """The upper bits of codes of 4 bits in groups of 32, each in the middle of the codes that it stands for."""
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    kept = [linear.weight.data for linear in linears]
    try:
        for linear, weight in zip(linears, kept, strict=True):
            groups = weight.unflatten(-1, (-1, 32))
            scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 7
            codes, step = (groups / scale).round().clamp(-8, 7), 2 ** (4 - bits)
            linear.weight.data = (((codes / step).floor() * step + (step - 1) / 2) * scale).flatten(-2)
        yield
    finally:
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = weight


@torch.inference_mode()
def write(model, prompt: list[int]) -> Written:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    cache = transformers.DynamicCache()
    model(ids, past_key_values=cache)
    return Written(ids, len(prompt), cache)


def _copy(written: Written, rows: int) -> transformers.DynamicCache:
    """The cache for several drafts at once."""
    cache = transformers.DynamicCache()
    for i, layer in enumerate(written.cache.layers):
        cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), i)
    return cache


@torch.inference_mode()
def right(model, written: Written) -> list[int]:
    """How many tokens of a draft are right in a row, from each place on whence the longest draft fits.

    A draft begins behind token t, which the whole model has not read yet: of what came before, it reads the whole
    model's keys and values, of t and its own tokens its own. As long as it is right its tokens are those of the text.
    """
    length = written.ids.shape[1]
    places = list(range(written.start - 1, length - MOST))
    found = []
    for first in range(0, len(places), CHAINS):
        chunk = torch.tensor(places[first : first + CHAINS])
        position = chunk[:, None] + torch.arange(MOST)
        own = torch.ones(MOST, MOST, dtype=torch.bool).tril().expand(len(chunk), -1, -1)
        past = (torch.arange(length) < chunk[:, None])[:, None].expand(-1, MOST, -1)
        seen = torch.cat([past, own], -1)[:, None]
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min).to(model.dtype)
        logits = model(
            written.ids[0, position], attention_mask=mask, position_ids=position,
            past_key_values=_copy(written, len(chunk)),
        ).logits  # fmt: skip
        same = logits.argmax(-1) == written.ids[0, position + 1]
        found += same.long().cumprod(-1).sum(-1).tolist()
    return found


def calls(rights: list[int], most: int) -> tuple[int, int]:
    """Tokens that are written with drafts of a length, and the calls that check them."""
    place = count = 0
    while place < len(rights):
        place, count = place + min(rights[place], most) + 1, count + 1
    return place, count


def row_of(rights: list[list[int]], cost: float, row_costs: list[float]) -> str:
    accepted, best = [], {row_cost: (0.0, 0) for row_cost in row_costs}
    for most in range(1, MOST + 1):
        tokens, checked = (sum(values) for values in zip(*(calls(text, most) for text in rights), strict=True))
        accepted.append(f"{tokens / checked - 1:.2f}")
        for row_cost in row_costs:
            speed = tokens / checked / (1 + most * (cost + row_cost))
            best[row_cost] = max(best[row_cost], (speed, most))
    return " | ".join([f"{cost:.2f}", *accepted, *(f"{speed:.2f} ({most})" for speed, most in best.values())])


@torch.inference_mode()
def chosen(model, ids: torch.Tensor, most: int) -> list[int]:
    """Layers in the order in which leaving them out adds least to the KL, those before left out already."""
    reference = model(ids, use_cache=False).logits.float().log_softmax(-1)
    order: list[int] = []
    while len(order) < most:
        kls = {}
        for layer in set(range(1, len(model.model.layers) - 1)) - set(order):
            with without(model, {*order, layer}):
                logits = model(ids, use_cache=False).logits.float().log_softmax(-1)
            kls[layer] = torch.nn.functional.kl_div(logits, reference, log_target=True, reduction="sum").item()
        order.append(min(kls, key=kls.__getitem__))
    return order


def families(layers: int, order: list[int]) -> dict[str, list[set[int]]]:
    most = [n for n in SKIPPED if n <= layers - 2]
    middle = {n: set(range((layers - n) // 2, (layers - n) // 2 + n)) for n in most}
    other = {n: set(range(layers // 2 - n, layers // 2 + n, 2)) for n in most if 2 * n <= layers - 2}
    return {
        "exit": [set(range(layers - n, layers)) for n in most],
        "middle": list(middle.values()),
        "every other": list(other.values()),
        "chosen": [set(order[:n]) for n in most],
    }


def cost_of(model, skipped: set[int]) -> float:
    """Bytes that a token of the draft reads, in those of the whole model: of the layers and the output projection."""
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head, count = model.lm_head.weight.numel(), len(model.model.layers)
    return (head + layer * (count - len(skipped))) / (head + layer * count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="bfloat16 is faster on CPUs that multiply it")
    parser.add_argument("--row-cost", type=float, nargs="+", default=[0.34, 0.0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype)).eval()
    kinds = prompts(given.model, given.text.read_text(encoding="utf-8"), given.texts)
    texts = {kind: [write(model, prompt) for prompt in kinds[kind]] for kind in ("copied", "greedy")}
    layers = len(model.model.layers)
    order = chosen(model, texts["greedy"][0].ids[:, -CHOOSING:], min(max(SKIPPED), layers - 2))
    print(f"chosen: {order}\n", flush=True)
    lengths = " | ".join(map(str, range(1, MOST + 1)))
    bounds = " | ".join(f"bound, row {cost:g}" for cost in given.row_cost)
    print(f"| draft | texts | cost | {lengths} | {bounds} |\n| --- |{' --- |' * (2 + MOST + len(given.row_cost))}")

    def say(name: str, cost: float, changed: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        with changed():
            for kind, written in texts.items():
                rights = [right(model, text) for text in written]
                print(f"| {name} | {kind} | {row_of(rights, cost, given.row_cost)} |", flush=True)

    for family, sets in families(layers, order).items():
        for skipped in sets:
            cost = cost_of(model, skipped)
            say(f"{family}, {len(skipped)} of {layers} left out", cost, lambda s=skipped: without(model, s))
    head = cost_of(model, set(range(layers)))
    for bits in (3, 2):
        say(f"{bits} of 4 bits", head + (1 - head) * bits / 4, lambda b=bits: of_bits(model, b))


if __name__ == "__main__":
    main()
