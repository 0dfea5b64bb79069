"""What drafts bring, and what they leave as it was: `qexport generate --draft lookup` beside plain decoding, in turns.

    python samples/drafts.py out --text text.txt

Three kinds of texts, `--texts` of each, behind paragraphs of the text: "copied" (a paragraph twice and its beginning
again, so that a small model copies it, as larger ones quote and edit what they were given), "greedy" (the likeliest
token), and "drawn" (temperature 1, which hardly repeats itself). For each: the time of plain decoding over that with
drafts, the decoder's calls for each token, how many guesses were right, and whether the texts are equal. Then calls of
a fixed number of tokens, guessed and not guessed, whose texts must be equal.
"""

import argparse
import statistics
import time
from pathlib import Path

from qexport.artifact import manifest as manifests
from qexport.runtime.decoder import Decoder, Generation, open_decoder
from qexport.runtime.drafts import Draft, Drafts, draft
from qexport.runtime.generate import open_tokenizer
from qexport.runtime.sampling import Sampling

PROMPT, NEW, ROWS = 96, 96, 4


@draft("nothing")
class Nothing(Draft):
    """Guesses nothing: calls of a fixed number of tokens are filled up."""

    def extend(self, tokens):
        pass

    def guess(self, count):
        return 0, []


def prompts(folder: Path, text: str, count: int) -> dict[str, list[list[int]]]:
    tokenizer = open_tokenizer(folder)
    paragraphs = [line.strip() for line in text.splitlines() if len(line) > 700]
    if len(paragraphs) < count:
        raise SystemExit(f"--text has {len(paragraphs)} paragraphs of more than 700 characters: pass a longer one")
    # From all over the text.
    ids = [tokenizer(paragraphs[i * len(paragraphs) // count])["input_ids"] for i in range(count)]
    between = tokenizer("\n\n")["input_ids"]
    return {
        "copied": [[*row[:PROMPT], *between, *row[:PROMPT], *between, *row[:8]] for row in ids],
        "greedy": [row[:PROMPT] for row in ids],
        "drawn": [row[:PROMPT] for row in ids],
    }


def write(decoder: Decoder, prompt: list[int], drafts: Drafts | None, sampling: Sampling | None):
    """A text, and the processor time that it took behind its prompt."""
    seconds: list[float] = []

    def began(row: int, token: int) -> None:
        if not seconds:
            seconds.append(time.process_time())

    made = decoder.generate([prompt], max_new_tokens=NEW, drafts=drafts, sampling=sampling, on_token=began)
    return made, time.process_time() - seconds[0]


def same(first: Generation, second: Generation) -> int:
    """How many tokens are the same from the beginning."""
    pairs = zip(first.tokens[0], second.tokens[0], strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(first.tokens[0]))


def compare(decoder: Decoder, rows: list[list[int]], sampling: Sampling | None, turns: int) -> str:
    ratios, agreed, calls, right, guessed = [], [], [], 0, 0
    for prompt in rows:
        found: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(turns + 1):
            made = {}
            for drafted in (turn % 2 == 0, turn % 2 == 1):
                made[drafted], took = write(decoder, prompt, Drafts() if drafted else None, sampling)
                found[drafted] += [took] if turn else []
        ratios.append(statistics.median(found[False]) / statistics.median(found[True]))
        agreed.append(same(made[False], made[True]))
        calls.append(made[True].calls / (NEW - 1))
        right, guessed = right + made[True].right, guessed + made[True].guessed
    return (
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {statistics.mean(calls):.2f} | "
        f"{right} of {guessed} | {sum(n == NEW for n in agreed)} of {len(rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=["copied", "greedy", "drawn"])
    parser.add_argument("--no-rows", action="store_true", help="no calls of a fixed number of tokens")
    given = parser.parse_args()
    kinds = prompts(given.folder, given.text.read_text(encoding="utf-8"), given.texts)
    kinds = {kind: rows for kind, rows in kinds.items() if kind in given.kinds}
    longest = max(len(row) for rows in kinds.values() for row in rows) + NEW + ROWS
    decoder = open_decoder(given.folder, manifests.load(given.folder), threads=1, max_length=longest)
    print("| texts | plain time / drafted | calls a token | guesses right | same text as plain |")
    print("| --- | --- | --- | --- | --- |")
    for kind, rows in kinds.items():
        sampling = Sampling(temperature=1.0, seed=1) if kind == "drawn" else None
        print(f"| {kind} | {compare(decoder, rows, sampling, given.turns)} |", flush=True)
    if given.no_rows:
        return
    equal = plain = count = 0
    for kind, rows in kinds.items():
        sampling = Sampling(temperature=1.0, seed=1) if kind == "drawn" else None
        for prompt in rows:
            guessed, blank, single = (
                write(decoder, prompt, drafts, sampling)[0]
                for drafts in (Drafts(rows=ROWS), Drafts("nothing", rows=ROWS), None)
            )
            equal, plain = equal + (guessed.tokens == blank.tokens), plain + (blank.tokens == single.tokens)
            count += 1
    print(f"\n{ROWS} tokens in every call: {equal} of {count} texts the same with guesses and without;")
    print(f"{plain} of {count} the same as by single tokens.")


if __name__ == "__main__":
    main()
