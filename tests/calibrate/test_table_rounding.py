"""Codes of a table that was tried are not looked for again, and only for the same table and format."""

import torch

from qexport.calibrate.block_activations import Stream
from qexport.calibrate.recipe_passes import TableRounding
from qexport.quant.formats import IntegerFormat
from qexport.recipe.registry import section


def test_what_was_tried_is_handed_out_once():
    table, fmt = torch.randn(6, 32), IntegerFormat(4, 16)
    rounding = TableRounding(section("weights", method="rtn"))
    tried = rounding.attempt("table", table, fmt)
    assert rounding("table", table, fmt) is tried
    again = rounding("table", table, fmt)
    assert again is not tried and torch.equal(again.codes, tried.codes)
    rounding.attempt("table", table, fmt)
    assert rounding("table", table, IntegerFormat(8, 16)).format.bits == 8
    rounding.attempt("table", table, fmt)
    assert torch.equal(rounding("other", -table, fmt).dequantize(), fmt.round_to_nearest(-table).dequantize())


def test_a_mask_without_padding_is_none():
    padded = torch.tensor([[True, True], [True, False]])
    stream = Stream([{}, {}], [torch.ones_like(padded), padded], {})
    assert stream.masks[0] is None and torch.equal(stream.masks[1], padded)
    assert stream.counted[0] is None and stream.counted[1] is stream.masks[1]
