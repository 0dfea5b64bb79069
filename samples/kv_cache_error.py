"""What few bits for keys and values cost attention: keys rounded before or behind rotation, scales by channel or not.

    python samples/kv_cache_error.py MODEL --text FILE [--tokens 2048]

Every attention of the float model runs on its float inputs, and again with its keys, or its values, rounded by scales
of this text. Printed is the SQNR of its output in dB, the mean over the layers and the least. The cache of an export
holds keys behind the rotation: that is what GroupQueryAttention keeps. Scales are one for every feature of every head
("channel"), one for all ("tensor"), or as WKVQuant has them (arXiv 2402.12065): features divided by a static factor
each, then a scale for every token of every head ("channel and token"). "past alone" is WKVQuant's too: every query sees
its own token's key and value as they are. And "turned" multiplies keys and values by a Hadamard matrix before they are
rounded (QuaRot's R2 and R3).
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
from qexport.quant.hadamard import rotation
from qexport.quant.kv_cache import cache_codes, cache_scale
from qexport.quant.metrics import sqnr_db
from qexport.validation.text import choose_text

ops = torch.ops.qexport


def rounded(x: torch.Tensor, bits: int, scales: str) -> torch.Tensor:
    """x [batch, heads, tokens, features] as a cache of codes would give it back."""
    if scales == "turned":
        turn = rotation(x.shape[-1]).float()
        return rounded(x @ turn, bits, "channel") @ turn.t()
    if scales == "channel and token":
        factors, largest = x.abs().amax((0, 2), keepdim=True).clamp_min(1e-9), 2 ** (bits - 1) - 1
        even = x / factors
        step = even.abs().amax(-1, keepdim=True).clamp_min(1e-9) / largest
        return (even / step).round() * step * factors
    absmax = x.abs().amax((0, 2), keepdim=True)[0] if scales == "channel" else x.abs().amax().view(1)
    scale = cache_scale(absmax, bits)
    return cache_codes(x, scale, bits).float() * scale


def past_alone(query, kept: tuple, own: tuple, mask, scale: float) -> torch.Tensor:
    """Attention of every query over rounded keys and values, but those of its own token; [batch, tokens, heads, size].

    Args:
        kept: keys and values as the cache gives them back; own: as they were. Both [batch, kv_heads, tokens, size].
    """
    repeat = query.shape[1] // own[0].shape[1]
    keys, values, k, v = (x.repeat_interleave(repeat, 1) for x in (*kept, *own))
    scores = query @ keys.transpose(2, 3)
    scores.diagonal(dim1=2, dim2=3).copy_((query * k).sum(-1))
    weights = torch.softmax(scores * scale + mask, -1)
    out = weights @ values + weights.diagonal(dim1=2, dim2=3)[..., None] * (v - values)
    return out.transpose(1, 2)


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
                for scales in ("channel", "tensor", "channel and token", "turned"):
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
                    both = rounded(key, bits, scales), rounded(value, bits, scales)
                    _, _, mask, factor, softcap = rest[:5]
                    if not softcap and len(rest) < 6:
                        self.found["both", bits, scales].append(sqnr_db(result[0], node.target(query, *both, *rest)[0]))
                        past = past_alone(query, both, (key, value), mask, factor)
                        self.found["both, past alone", bits, scales].append(sqnr_db(result[0], past))
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
