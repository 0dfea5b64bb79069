"""Biases of scores that GroupQueryAttention takes beside a cache: of a head and the place of a key in its row alone.

ALiBi (arXiv 2108.12409) adds slope * place. Softmax does not mind what is the same for all keys of a query, so places
may be counted from any end. What a model adds is found by running its own nodes on a few masks, padded ones among them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..graph.edit import is_call
from ..graph.views import tensor_name
from .block_io import names_of
from .rotary import ancestors

ops = torch.ops.qexport
_PLACES, _MOST = 2048, 4096  # places that are tried where no length is stated, and at most
_LEADS, _SHORT = (0, 5, 29), 32  # of padded rows, and their length
_CLOSE = 1e-5  # of the largest bias; float32 products leave 1e-6


class Masks:
    """What attention of a decoder adds to its scores, followed through the blocks that make it.

    Args:
        made: by name, the block and node of each value that leaves a block.
        read: a tensor of the first block.
    """

    def __init__(
        self, captured: CapturedModel, made: Mapping[str, tuple[Block, Node]], read: Callable[[str], Tensor]
    ) -> None:
        self._captured, self._made, self._read = captured, made, read
        self._public = {port.value: port for port in captured.inputs}
        self._found: dict[tuple[str, str], Tensor | None] = {}

    def sources(self, block: Block, node: Node) -> dict[Node, Block]:
        """All nodes that a value is made of, wherever they are."""
        names, found = names_of(block), dict[Node, Block]()
        for at in ancestors(node):
            found[at] = block
            if (made := self._made.get(names.get(at, ""))) is not None:
                home, source = made
                found |= self.sources(home, source)
        return found

    def made_by(self, block: Block, node: Node) -> Node:
        """The node that makes a value, in this block or in the one that hands it on."""
        made = self._made.get(names_of(block).get(node, ""))
        return node if made is None else self.made_by(*made)

    def causal(self, block: Block, node: Node) -> tuple[Node, Block] | None:
        """The one causal mask that a value is made of, and where; None where there are none or several."""
        found = [(n, home) for n, home in self.sources(block, node).items() if is_call(n, ops.causal_mask.default)]
        return found[0] if len(found) == 1 else None

    def bias(self, block: Block, node: Node) -> Tensor | None:
        """What a mask adds to the scores of visible keys, [heads, 1] slopes or [heads, places]; None where it is more.

        Up to what is the same for all keys of a query.
        """
        key = block.name, node.name
        if key not in self._found:
            try:
                self._found[key] = self._table(block, node)
            except (KeyError, ValueError):  # it reads what is not known before the model runs
                self._found[key] = None
        return self._found[key]

    def _table(self, block: Block, node: Node) -> Tensor | None:
        stated = self._captured.settings.get("max_position_embeddings")
        places = min(stated or _PLACES, _MOST)
        long = self._run(block, node, torch.ones(1, places, dtype=torch.int64), new=2)[0]
        table = long[:, 1] - long[:, 1, -1:]
        close = _CLOSE * float(table.abs().max())
        before = long[:, 0, :-1] - long[:, 0, -2, None]
        if not torch.allclose(before, table[:, :-1] - table[:, -2, None], rtol=0, atol=close):
            return None
        length = min(_SHORT, places)
        mask = torch.stack([(torch.arange(length) >= lead).long() for lead in _LEADS if lead < length])
        padded = self._run(block, node, mask, new=length).expand(len(mask), *[-1] * 3)[:, :, -1]
        for row, real in zip(padded, mask.bool(), strict=True):
            got, many = row[:, real] - row[:, -1:], int(real.sum())
            if not torch.allclose(got, table[:, :many] - table[:, many - 1, None], rtol=0, atol=close):
                return None
        slopes = (table[:, -1:] - table[:, :1]) / (places - 1)
        if torch.allclose(slopes * torch.arange(1 - places, 1), table, rtol=0, atol=close):
            return slopes
        return table if stated == places else None

    def _run(self, block: Block, node: Node, mask: Tensor, new: int) -> Tensor:
        """The value for the last `new` tokens of texts, [batch or 1, heads, new, keys]."""
        batch, past = len(mask), mask.shape[1] - new
        given: dict[str, Any] = {
            "attention_mask": mask, "input_ids": torch.zeros(batch, new, dtype=torch.int64),
            "position_ids": torch.arange(past, past + new).expand(batch, -1),
        }  # fmt: skip
        for port in self._public.values():
            if port.name.startswith("past_key_values."):
                sizes = (batch, *(past if isinstance(size, str) else size for size in port.dims[1:]))
                given[port.name] = torch.zeros(1).expand(sizes)  # whose size alone is read
        known: dict[Node, Any] = {}
        for at, home in self._in_order(block, node):
            if at.op == "placeholder":
                name = names_of(home)[at]
                known[at] = given[self._public[name].name] if name in self._public else known[self._made[name][1]]
            elif at.op == "get_attr":
                if home is not self._captured.blocks[0]:
                    raise KeyError(at.name)
                known[at] = self._read(tensor_name(at))
            elif callable(at.target):
                arguments, options = map_arg((at.args, dict(at.kwargs)), known.__getitem__)
                known[at] = at.target(*arguments, **options)
        value: Tensor = known[node]
        return value.float()

    def _in_order(self, block: Block, node: Node) -> list[tuple[Node, Block]]:
        """All sources, each behind what it is made of."""
        sources = self.sources(block, node)
        return [
            (at, home)
            for home in self._captured.blocks
            for at in home.module.graph.nodes
            if sources.get(at) is home
        ]  # fmt: skip
