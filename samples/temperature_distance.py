"""How far exports draw from their float model at each temperature, with error bars narrow enough to see a small effect.

    python samples/temperature_distance.py MODEL EXPORT... --text FILE [--prompts 96] [--tokens 32]

The float model continues the beginnings of many passages, all at once, at every temperature. Exports read these texts,
and the distance is the total variation between both distributions at that temperature: the share of draws that differ
at least, mean over the tokens of a text. Beside it, the same distance on the texts that were written at temperature 1,
so that what temperature does to a distribution is told from what it does to texts. Intervals are by a bootstrap over
passages; differences between temperatures are taken passage by passage.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qexport.api.stages.capturing import capture_model
from qexport.artifact import manifest as manifests
from qexport.calibrate.float_model import running
from qexport.runtime.decoder import open_decoder
from qexport.sampling_study.measures import total_variation

BATCH, DRAWS = 8, 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("exports", nargs="+", type=Path, help="folders that `qexport export` wrote")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text whose paragraphs are begun")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32, help="new ones")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.2, 0.35, 0.5, 0.65, 0.8, 1.0])
    given = parser.parse_args()

    captured = capture_model(given.model)
    prompts = beginnings(captured.origin.tokenizer(), given.text, given.prompts, given.prompt_tokens)
    length = given.prompt_tokens + given.tokens
    runs = {folder.name: exported(folder, length) for folder in given.exports}
    own: dict[tuple[str, float], list[Tensor]] = {(n, t): [] for n in runs for t in given.temperatures}
    same: dict[tuple[str, float], list[Tensor]] = {key: [] for key in own}
    with running(captured) as run:
        for temperature in given.temperatures:
            for part, batch in enumerate(prompts.split(BATCH)):
                draws = torch.Generator().manual_seed(part)  # the same numbers at every temperature
                texts = continued(run, batch, given.tokens, temperature, draws)
                want = run(texts[:, :-1], None, given.tokens)[0].float()
                for name, forced in runs.items():
                    got = forced(texts[:, :-1])[:, -given.tokens :]
                    own[name, temperature].append(distances(want, got, temperature))
                    for other in given.temperatures if temperature == 1 else ():
                        same[name, other].append(distances(want, got, other))
            print(f"<!-- temperature {temperature:g} done -->", flush=True)
    report(own, "each temperature's own texts", given)
    if 1.0 in given.temperatures:
        report(same, "the texts of temperature 1", given)


def beginnings(tokenizer, text: Path, count: int, length: int) -> Tensor:
    """The first tokens of paragraphs that are spread over the text, int64 [count, length]."""
    paragraphs = [line.strip() for line in text.read_text("utf-8").splitlines() if len(line) > 200]
    rows = [ids[:length] for p in paragraphs if len(ids := tokenizer.encode(p)) >= length]
    if len(rows) < count:
        raise SystemExit(f"{text} has {len(rows)} paragraphs of {length} tokens, fewer than {count}")
    return torch.tensor([rows[i * len(rows) // count] for i in range(count)])


def exported(folder: Path, length: int) -> Callable[[Tensor], Tensor]:
    """A function from token ids [batch, S] to an export's logits, float32 [batch, S, vocabulary]."""
    decoder = open_decoder(folder, manifests.load(folder), threads=1, max_length=length)

    def run(ids: Tensor) -> Tensor:
        decoder.reset()
        return torch.from_numpy(np.array(decoder.run(ids.numpy()), np.float32))

    return run


def continued(run, prompts: Tensor, count: int, temperature: float, draws: torch.Generator) -> Tensor:
    """Prompts with `count` drawn tokens behind them."""
    texts, (logits, past) = prompts, run(prompts, None, 1)
    for left in reversed(range(count)):
        likely = torch.softmax(logits[:, -1].double() / temperature, -1)
        drawn = torch.multinomial(likely, 1, generator=draws)
        texts = torch.cat([texts, drawn], 1)
        if left:
            logits, past = run(drawn, past, 1)
    return texts


def distances(want: Tensor, got: Tensor, temperature: float) -> Tensor:
    """Mean over the tokens of each text, float64 [batch]."""
    return torch.stack([total_variation(w, g, temperature, 0).mean() for w, g in zip(want, got, strict=True)])


def report(found: dict[tuple[str, float], list[Tensor]], what: str, given: argparse.Namespace) -> None:
    """A table of distances, and of differences from temperature 1."""
    names, temperatures = dict.fromkeys(name for name, _ in found), given.temperatures
    values = {key: torch.cat(parts) for key, parts in found.items()}
    picked = torch.randint(given.prompts, (DRAWS, given.prompts), generator=torch.Generator().manual_seed(0))
    print(f"\nDistance on {what}, ± its standard error over {given.prompts} passages of {given.tokens} tokens\n")
    print("| format | " + " | ".join(f"{t:g}" for t in temperatures) + " |")
    print("| --- " * (len(temperatures) + 1) + "|")
    for name in names:
        cells = [values[name, t] for t in temperatures]
        print(f"| {name} | " + " | ".join(f"{v.mean():.4f} ± {v[picked].mean(1).std():.4f}" for v in cells) + " |")
    if 1.0 not in temperatures:
        return
    print("\nDistance less that at temperature 1, passage by passage, with 95 % intervals\n")
    print("| format | " + " | ".join(f"{t:g}" for t in temperatures if t != 1) + " |")
    print("| --- " * len(temperatures) + "|")
    for name in names:
        cells = []
        for t in temperatures:
            if t != 1:
                difference = values[name, t] - values[name, 1.0]
                low, high = difference[picked].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
                cells.append(f"{difference.mean():+.4f} ({low:+.4f} to {high:+.4f})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
