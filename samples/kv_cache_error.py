"""What few bits for keys and values cost attention: keys rounded before or behind rotation, scales by channel or not.

    python samples/kv_cache_error.py MODEL --text FILE [--tokens 2048]

Every attention of the float model runs on its float inputs, and again with its keys, or its values, rounded by scales
of this text. Printed is the SQNR of its output in dB, the mean over the layers and the least. The cache of an export
holds keys behind the rotation: that is what GroupQueryAttention keeps.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
from torch.fx import Interpreter

from qexport.api.stages.capturing import capture_model
from qexport.calibrate.block_activations import Stream, decoder_inputs, last_readers
from qexport.calibrate.float_model import weights_of
from qexport.graph.edit import is_call
from qexport.quant.kv_cache import cache_codes, cache_scale
from qexport.quant.metrics import sqnr_db
from qexport.validation.text import choose_text

ops = torch.ops.qexport


def rounded(x: torch.Tensor, bits: int, scales: str) -> torch.Tensor:
    """x [batch, heads, tokens, features] as a cache of codes would give it back."""
    absmax = x.abs().amax((0, 2), keepdim=True)[0] if scales == "channel" else x.abs().amax().view(1)
    scale = cache_scale(absmax, bits)
    return cache_codes(x, scale, bits).float() * scale


class Attentions(Interpreter):
    """Runs a block and notes the SQNR of its attention for every way to keep keys and values."""

    def __init__(self, module, found):
        super().__init__(module, garbage_collect_values=False)
        self.found = found

    def run_node(self, node):
        result = super().run_node(node)
        if is_call(node, ops.cached_attention.default):
            query, key, value, *rest = self.fetch_args_kwargs_from_env(node)[0]
            turned = node.args[1] if is_call(node.args[1], ops.rotary_embedding.default) else None
            for bits in (8, 4):
                for scales in ("channel", "tensor"):
                    variants = {
                        "keys, behind rotation": (rounded(key, bits, scales), value),
                        "values": (key, rounded(value, bits, scales)),
                    }
                    if turned is not None:
                        x, cos, sin = (self.env[n] for n in turned.args)
                        before = ops.rotary_embedding(rounded(x, bits, scales), cos, sin)
                        variants["keys, before rotation"] = (before, value)
                    for name, (k, v) in variants.items():
                        out = node.target(query, k, v, *rest)[0]
                        self.found[name, bits, scales].append(sqnr_db(result[0], out))
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    captured = capture_model(given.model)
    ids = choose_text(captured, given.text, 1, given.tokens, lambda *_: None).windows
    feeds = decoder_inputs(captured, ids, torch.ones_like(ids))
    keep = last_readers(captured)
    stream = Stream([{p.value: feeds[p.name] for p in captured.inputs if p.value in keep}], [None], keep)
    found: dict[tuple, list[float]] = defaultdict(list)
    for index, block in enumerate(captured.blocks[:-1]):
        with weights_of(captured, block), torch.no_grad():
            Attentions(block.module, found).run(*stream.inputs(block, 0))
            stream.advance(block, index)
    print("| rounded | bits | scales by | SQNR, mean | least |\n| --- | --- | --- | --- | --- |")
    for (name, bits, scales), values in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1])):
        print(f"| {name} | {bits} | {scales} | {mean(values):.1f} dB | {min(values):.1f} dB |")


if __name__ == "__main__":
    main()
