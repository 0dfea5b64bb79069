"""Attention rewritten for ONNX Runtime's GroupQueryAttention: a cache that can be one shared buffer, rotary inside.

The operator appends to each row of its cache behind the tokens that the row holds and knows no mask. So the first block
puts the real tokens of every row first, the last one puts them back, and a row with padding where none may be comes out
as NaN rather than as something plausible. A model that the operator cannot serve keeps standard Attention.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..artifact.cache_names import is_state, is_tokens
from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..graph.edit import TensorSpec, add_tensor, call, is_call, shape_of
from ..graph.meta import Meta
from ..graph.views import END, CachedAttention, CausalMask, Item, RoundCache, RoundE4M3, size_at
from .block_io import first_call, hand_on, names_of, producers, prune, read_in
from .compact_padding import LAST, TOTAL, rows_of, turn_back, turn_tokens, turned_inputs, turned_name
from .flat_heads import flat_heads, flatten_users
from .position_bias import Masks
from .rotary import RotatedHeads, position_table, rotated
from .row_places import Read, can_be_turned, read_by_place
from .why_written_out import why_written_out

aten = torch.ops.aten
ops = torch.ops.qexport
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default)
_OF_CACHE = (ops.cached_attention.default, aten.sym_size.int)


class Unsuited(Exception):
    """GroupQueryAttention cannot serve the model; the text says why."""


@dataclass(frozen=True)
class _Site:
    """One attention of the model.

    Attributes:
        block, node: where it is.
        window: of its mask.
        query, key, value: what it reads, before it is rounded for the cache.
        scales, bits: of a cache of codes, for keys and values; None and 0 for one of floats.
        e4m3: codes are E4M3 numbers.
        bias: as `Masks.bias` finds it; None where the mask is all that is added to the scores.
    """

    block: Block
    node: Node
    window: int
    query: Node
    key: Node
    value: Node
    scales: tuple[Node, Node] | tuple[None, None]
    bits: int
    e4m3: bool = False
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class GroupedAttention:
    """How a decoder's attention becomes GroupQueryAttention.

    Attributes:
        sites: every attention.
        inside: by attention, how query and key are rotated, where the operator can do it itself.
        tables: [positions, n], the cosines and sines for that, by the name of the value they are a table of.
        placed: what the first block reads by place in the row.
    """

    sites: Sequence[_Site]
    inside: Mapping[Node, tuple[RotatedHeads, RotatedHeads] | None]
    tables: Mapping[str, torch.Tensor]
    placed: Sequence[Read]

    @property
    def biases(self) -> dict[str, torch.Tensor]:
        """What attentions add to scores, each once, by a name for it."""
        found: list[torch.Tensor] = []
        for site in self.sites:
            if site.bias is not None and not any(torch.equal(site.bias, known) for known in found):
                found.append(site.bias)
        return {f"bias.{number}": table for number, table in enumerate(found)}


def plan_grouping(
    captured: CapturedModel, read: Callable[[str], torch.Tensor], e4m3: bool = False
) -> GroupedAttention:
    """Look for all that GroupQueryAttention needs; changes nothing.

    Args:
        captured: a decoder, quantized or not.
        read: a tensor of its first block.
        e4m3: whether the operator keeps E4M3 numbers; else they are rounded in front of a cache of floats.

    Raises:
        Unsuited: says why GroupQueryAttention cannot serve the model.
    """
    values = {port.name: port.value for port in captured.inputs}
    masks = Masks(captured, producers(captured), read)
    sites, made_of = _sites(captured, values, masks, e4m3)
    placed = _placed(captured, sites, made_of)
    tables = _Tables(captured, values["position_ids"], read)
    inside = {site.node: tables.of(site) for site in sites}
    found = {name: table for name, table in tables.made.items() if table is not None}
    return GroupedAttention(sites, inside, found, placed)


def count_attentions(captured: CapturedModel) -> int:
    """How many attentions read a cache as it is: fewer than there are caches where a model does otherwise with some."""
    nodes = (node for block in captured.blocks for node in block.module.graph.nodes)
    return sum(is_call(node, ops.cached_attention.default) for node in nodes)


def group_attention(captured: CapturedModel, grouping: GroupedAttention) -> None:
    """Rewrite a decoder's blocks, its inputs too where nothing reads positions any more, in place."""
    values = {port.name: port.value for port in captured.inputs}
    first = captured.blocks[0]
    behind = [names_of(block) for block in captured.blocks[1:]]
    later = {name: node.meta[Meta.SPEC] for names in behind for node, name in names.items()}
    turn_tokens(first, values, later, grouping.placed)
    turned = {values[name]: turned_name(name) for name in turned_inputs(values)}
    for block in captured.blocks[1:]:
        block.inputs[:] = [turned.get(name, name) for name in block.inputs]
    graph = first.module.graph
    _add_biases(captured, grouping, values)
    for name, table in grouping.tables.items():
        with graph.inserting_before(first_call(graph)):
            hand_on(first, add_tensor(graph, f"rotary.{name}", table), f"rotary.{name}")
    codes: dict[str, _Site] = {}
    for site in grouping.sites:
        names, attention = names_of(site.block), CachedAttention.of(site.node)
        codes |= dict.fromkeys((names[past] for past in (attention.past_key, attention.past_value)), site)
        _replace(site, grouping.inside[site.node], grouping.tables, grouping.biases)
    _keep_codes(captured, codes)
    turn_back(captured.blocks[-1], captured)
    prune(captured)


def _sites(
    captured: CapturedModel, values: dict[str, str], masked: Masks, e4m3: bool
) -> tuple[list[_Site], set[Node]]:
    """Every attention, and all that their masks are made of."""
    if not {"attention_mask", "position_ids"} <= values.keys() or not any(map(is_tokens, values)):
        raise Unsuited("it does not read tokens, a mask and positions")
    sites: list[_Site] = []
    masks: set[Node] = set()
    of_all: set[Node] = set()
    biased: dict[Node, Block] = {}
    if count_attentions(captured) < sum(name.startswith("past_key_values.") for name in values) // 2:
        raise Unsuited(why_written_out(captured))
    first, last = captured.blocks[0], captured.blocks[-1]
    for block in captured.blocks:
        names = names_of(block)
        for node in block.module.graph.nodes:
            if (attention := CachedAttention.match(node)) is None:
                continue
            found = masked.causal(block, attention.mask)
            if found is None or found[1] is not first:
                raise Unsuited("its mask is made of more than the attention mask")
            source, bias = found[0], None
            mask, made_of = CausalMask.of(source), masked.sources(block, attention.mask)
            of_all |= made_of.keys()
            if mask.chunk and mask.chunk < captured.settings.get("max_position_embeddings", END):
                raise Unsuited("layers of it attend in chunks, which GroupQueryAttention does not know")
            if masked.made_by(block, attention.mask) is not source:
                if attention.softcap or attention.sinks is not None:
                    raise Unsuited("it adds a bias to scores that are capped or have sinks")
                bias = masked.bias(block, attention.mask)
                if bias is None:
                    raise Unsuited("what it adds to the scores is more than a number for a head and the place of a key")
                biased |= made_of
            if names.get(attention.past_key) not in values.values():
                raise Unsuited("its cache is changed before attention reads it")
            if attention.past_key is attention.past_value:
                raise Unsuited("its keys are its values too, and GroupQueryAttention keeps both")
            size = size_at(attention.key, -1)
            if size != size_at(attention.value, -1):
                raise Unsuited("keys and values have heads of different size")
            if size % 8:
                raise Unsuited(f"heads of {size} features, and ONNX Runtime wants a multiple of 8")
            masks.add(source)
            sites.append(replace(_site(block, node, attention, mask.window, e4m3), bias=bias))
    if not sites or first is last or sites[-1].block is last:
        raise Unsuited("the model could not be cut into a beginning, layers and an end")
    pasts = {value for name, value in values.items() if name.startswith("past_key_values.")}
    for block in captured.blocks:
        for placeholder, name in names_of(block).items():
            if name in pasts and not all(is_call(user, *_OF_CACHE) for user in placeholder.users):
                raise Unsuited("layers of it attend to the keys and values of others")
            if name == values["attention_mask"] and not _ends_in(placeholder, masks | biased.keys()):
                raise Unsuited("something other than attention reads the attention mask")
    if any(not _of_masks(node, biased) for node, home in biased.items()):
        raise Unsuited("something other than attention reads the attention mask")
    if any(map(is_state, values)):
        raise Unsuited("layers of it keep states, which would read the padding that is put behind a text")
    return sites, of_all


def _placed(captured: CapturedModel, sites: Sequence[_Site], made_of: set[Node]) -> list[Read]:
    """What the first block reads by place in the row; made_of: what masks are made of."""
    batch, _, tokens, _ = shape_of(sites[0].query)
    first, *others = (read_by_place(block, tokens, made_of) for block in captured.blocks)
    if any(others) or not can_be_turned(first, batch, tokens):
        raise Unsuited("layers of it count the places of tokens in their row, padding included")
    return first


def _of_masks(node: Node, biased: Mapping[Node, Block]) -> bool:
    """Whether a value is read for nothing but what attention adds to scores; lengths may be read by anything."""
    if node.op != "call_function" or not isinstance(node.meta[Meta.SPEC], TensorSpec) or not shape_of(node):
        return True
    known = (user in biased or user.op == "output" or CachedAttention.match(user) is not None for user in node.users)
    return all(known)


def _add_biases(captured: CapturedModel, grouping: GroupedAttention, values: Mapping[str, str]) -> None:
    """Let the first block make what is added to scores, and hand it on; layers that add the same share it."""
    first = captured.blocks[0]
    graph, by_name = first.module.graph, {name: node for node, name in names_of(first).items()}
    mask, ids = by_name[values["attention_mask"]], rows_of(first, values)
    for name, table in grouping.biases.items():
        with graph.inserting_before(first_call(graph)):
            slopes = add_tensor(graph, f"{name}.table", table)
            shape = (1, len(table), shape_of(ids)[1], shape_of(mask)[1])
            bias = call(graph, ops.position_bias.default, (slopes, mask, ids), like=slopes, shape=shape)
        hand_on(first, bias, name)


def _keep_codes(captured: CapturedModel, sites: Mapping[str, _Site]) -> None:
    """Give the model's caches of codes their type; sites: by the value of the past."""
    held = {port.name: sites[port.value] for port in captured.inputs if port.value in sites}
    for ports in (captured.inputs, captured.outputs):
        for index, port in enumerate(ports):
            site = held.get(port.name.replace("present.", "past_key_values."))
            if site is not None and site.bits:
                spec = _codes(TensorSpec(port.dtype, port.dims), site)
                ports[index] = replace(port, dtype=spec.dtype, dims=spec.shape)


def _codes(spec: TensorSpec, site: _Site) -> TensorSpec:
    """The type of a cache of codes, see quant.kv_cache."""
    if site.e4m3:
        return replace(spec, dtype=torch.float8_e4m3fn)
    if site.bits == 8:
        return replace(spec, dtype=torch.int8)
    *axes, size = spec.shape
    if not isinstance(size, int):
        raise TypeError(f"heads of {size} features")
    return TensorSpec(torch.uint8, (*axes, size // 2))


def _site(block: Block, node: Node, attention: CachedAttention, window: int, e4m3: bool) -> _Site:
    floats = RoundE4M3.match(attention.key), RoundE4M3.match(attention.value)
    if e4m3 and floats[0] is not None and floats[1] is not None:
        scales = floats[0].scale, floats[1].scale
        return _Site(block, node, window, attention.query, floats[0].x, floats[1].x, scales, 8, True)
    key, value = RoundCache.match(attention.key), RoundCache.match(attention.value)
    if key is None or value is None:
        return _Site(block, node, window, attention.query, attention.key, attention.value, (None, None), 0)
    return _Site(block, node, window, attention.query, key.x, value.x, (key.scale, value.scale), key.bits)


def _ends_in(node: Node, ends: set[Node]) -> bool:
    """Whether a value is read, as it is or as another type, by nothing but `ends`."""
    return all(user in ends or is_call(user, *_CASTS) and _ends_in(user, ends) for user in node.users)


class _Tables:
    """Rotary tables of the attentions that can rotate inside.

    Attributes:
        made: [positions, n] by the name of the value it is a table of; None where that is none.
    """

    def __init__(self, captured: CapturedModel, position_ids: str, read: Callable[[str], torch.Tensor]) -> None:
        self._first, self._position_ids, self._read = captured.blocks[0], position_ids, read
        self._length = captured.settings.get("max_position_embeddings")
        self.made: dict[str, torch.Tensor | None] = {}

    def of(self, site: _Site) -> tuple[RotatedHeads, RotatedHeads] | None:
        """How query and key are rotated, where one pair of tables of positions alone does it."""
        query, key = rotated(site.query), rotated(site.key)
        if query is None or key is None or self._length is None or (query.cos, query.sin) != (key.cos, key.sin):
            return None
        names = names_of(site.block)
        tables = [self._table(names.get(node), self._length) for node in (query.cos, query.sin)]
        return None if any(table is None for table in tables) else (query, key)

    def _table(self, name: str | None, length: int) -> torch.Tensor | None:
        if name is None:
            return None
        if name not in self.made:
            self.made[name] = position_table(self._first, name, self._position_ids, length, self._read)
        return self.made[name]


def _replace(
    site: _Site, inside: tuple[RotatedHeads, RotatedHeads] | None, tables: Mapping[str, torch.Tensor],
    biases: Mapping[str, torch.Tensor],
) -> None:  # fmt: skip
    graph, node, names = site.block.module.graph, site.node, names_of(site.block)
    query, key, value = site.query, site.key, site.value
    attention = CachedAttention.of(node)
    pasts = attention.past_key, attention.past_value
    last = read_in(site.block, LAST, TensorSpec(torch.int32, (shape_of(query)[0],)))
    total = read_in(site.block, TOTAL, TensorSpec(torch.int32, (1,)))
    cos = sin = None
    if inside is not None:
        query, key = (part.x for part in inside)
        cos, sin = (
            read_in(site.block, f"rotary.{names[n]}", TensorSpec(torch.float32, tuple(tables[names[n]].shape)))
            for n in (inside[0].cos, inside[0].sin)
        )
    optional: list[Any] = [attention.sinks, site.e4m3 or None]
    if site.bias is not None:
        name = next(name for name, table in biases.items() if torch.equal(table, site.bias))
        batch, sequence = shape_of(query)[0], shape_of(query)[2]
        spec = TensorSpec(torch.float32, (1, len(site.bias), sequence, f"total_of_{batch}"))
        optional = [None, site.e4m3, read_in(site.block, name, spec)]
    while optional and optional[-1] is None:
        optional.pop()
    kept = node.meta[Meta.SPEC]
    if site.bits:
        for past in pasts:
            past.meta[Meta.SPEC] = _codes(past.meta[Meta.SPEC], site)
        kept = (kept[0], *(_codes(spec, site) for spec in kept[1:]))
    with graph.inserting_before(node):
        flat = [flat_heads(graph, part) for part in (query, key, value)]
        new = call(
            graph, ops.grouped_attention.default,
            (
                *flat, *pasts, last, total, cos, sin, *site.scales, site.bits, attention.scale, attention.softcap,
                site.window, *optional,
            ),
            like=flat[0],
        )  # fmt: skip
        results = {}
        for index, (spec, like) in enumerate(zip(kept, (flat[0], *pasts), strict=True)):
            results[index] = call(graph, operator.getitem, (new, index), like=like)
            if index:
                results[index].meta[Meta.SPEC] = spec
        new.meta[Meta.SPEC] = tuple(part.meta[Meta.SPEC] for part in results.values())
    for user in list(node.users):
        if place := Item.of(user).index:
            user.replace_all_uses_with(results[place])
        else:
            flatten_users(graph, user, results[0])
