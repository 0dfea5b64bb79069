"""What a decoder computes of several tokens in one call, beside the same tokens one by one, and what that costs.

    python samples/tokens_in_a_step.py out --text text.txt

Behind 128 tokens of the text: in how many rows the logits are bit by bit those of single tokens, and those of pairs,
how far they are from the former, and the processor time of a call relative to that of a single token. Drafts
(speculative decoding) live on what several tokens cost less than as many calls; whether the text stays the same one
depends on the kernels computing the same.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from qexport.artifact import manifest as manifests
from qexport.runtime.decoder import Decoder, open_decoder
from qexport.runtime.generate import open_tokenizer

PAST, TOKENS, WIDTHS = 128, 24, (1, 2, 3, 4, 6, 8, 12)


def read(decoder: Decoder, ids: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    """Logits of the tokens behind the first ones, `width` in a call, and the median processor time of a call."""
    decoder.reset()
    decoder.run(ids[:, :PAST])
    rows, took = [], []
    for start in range(PAST, PAST + TOKENS, width):
        began = time.process_time()
        rows.append(np.array(decoder.run(ids[:, start : start + width])[0]))
        took.append(time.process_time() - began)
    return np.concatenate(rows), statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8")[:8000]
    ids = np.array(open_tokenizer(given.folder)(text)["input_ids"][: PAST + TOKENS])[None]
    decoder = open_decoder(given.folder, manifests.load(given.folder), threads=1, max_length=PAST + TOKENS)
    found: dict[int, list[tuple[np.ndarray, float]]] = {width: [] for width in WIDTHS}
    for _ in range(given.turns):
        for width, runs in found.items():
            runs.append(read(decoder, ids, width))
    logits = {width: runs[0][0] for width, runs in found.items()}
    seconds = {width: statistics.median(took for _, took in runs) for width, runs in found.items()}
    for width in WIDTHS:
        rows = logits[width]
        as_single, as_pairs = ((rows == logits[other]).all(-1).mean() for other in (1, 2))
        print(
            f"{width:2d} tokens in a call: {as_single:4.0%} of rows as single, {as_pairs:4.0%} as pairs; largest "
            f"difference {np.abs(rows - logits[1]).max():.2g}, same likeliest "
            f"{(rows.argmax(-1) == logits[1].argmax(-1)).mean():4.0%}; time {seconds[width] / seconds[1]:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
