"""Tracing a language model into blocks: through torch.export, one layer of every kind."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel

from ..errors import CaptureError, root_cause
from ..graph.edit import attributes, get_tensor, set_tensor
from ..graph.meta import Meta
from ..graph.translated import without_form
from ..graph.views import results_of, tensor_name
from ..models.quiet import quiet_transformers
from ..models.steps import LISTED, WITHOUT_CACHE, cache_name, step_arguments
from . import expert_attention as _expert_attention  # noqa: F401  declares it
from . import expert_forms as _expert_forms  # noqa: F401  declares them
from . import indexed_blocks as _indexed_blocks  # noqa: F401  declares them
from . import ngrams as _ngrams  # noqa: F401  declares them
from . import summaries as _summaries  # noqa: F401  declares them
from .attention import GraphCache, GraphCacheLayer, ProbeCache, tracing, unknown_state
from .blocks import Block, cut
from .causal_convolutions import fuse_causal_convolutions
from .constants import fold_constants
from .decompose import decomposed
from .expert_copies import copy_experts
from .experts import tokens_of
from .graph import BATCH
from .indexers import fuse_choices
from .kept import KEY, Layer, by_layer, kept_in
from .layer_groups import LayerGroups, find_layers
from .layer_stamps import stamp
from .normalize import to_normal_form
from .recurrences import recurrences_as_nodes
from .recurrences.wkv import ListedStates, kept_by_layer
from .streamed import fake_parameters
from .weight_views import WeightView, cut_weights, moved
from .written_attention import fuse_written_attention

aten = torch.ops.aten
# Sizes of the example inputs. torch.export specialises 0 and 1, and two dimensions of one size could be taken for the
# same one; the graph it makes with these is right for every size, 0 and 1 included.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5
_SIZES = {BATCH: _BATCH, "sequence_length": _SEQUENCE, "total_sequence_length": _PAST + _SEQUENCE}
_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[torch.Tensor]], dict[str, torch.Tensor]]
Dims = tuple[int | str, ...]


def _call(model: PreTrainedModel, given: Mapping[str, Any]) -> Any:
    """A model's forward, its cache as it takes it; in front of a text that may be nothing."""
    read = {name: value for name, value in given.items() if name not in ("past_key_values", "use_cache")}
    cache = given["past_key_values"]
    if cache_name(model) == LISTED:
        cache = ListedStates(cache) if isinstance(cache, GraphCache) else None
    return model(**step_arguments(model, read, cache))


@dataclass(frozen=True)
class Reads:
    """What a decoder reads in the place of token ids.

    Attributes:
        tokens: name and dimensions of what stands for the new tokens, float32 [batch, sequence, features].
        positions: dimensions of position_ids.
        others: further inputs, by name dimensions and dtype.
        call: runs a model on all of them, with past_key_values and use_cache, by name.
    """

    tokens: tuple[str, Dims]
    positions: Dims = (BATCH, "sequence_length")
    others: Mapping[str, tuple[Dims, torch.dtype]] = field(default_factory=dict)
    call: Callable[[PreTrainedModel, Mapping[str, Any]], Any] = _call

    @property
    def in_front(self) -> dict[str, tuple[Dims, torch.dtype]]:
        """Dimensions and dtype of what stands in front of the cache; behind it come `others`."""
        name, dims = self.tokens
        return {
            name: (dims, torch.float32 if len(dims) == 3 else torch.int64),
            "attention_mask": ((BATCH, "total_sequence_length"), torch.int64),
            "position_ids": (self.positions, torch.int64),
        }


TOKEN_IDS = Reads(("input_ids", (BATCH, "sequence_length")))


class _Flat(torch.nn.Module):
    """The model with every input and output a plain tensor; `input_ids` are whatever stands for tokens.

    Args:
        layers: what each layer keeps, in the order of its part of `past`.
    """

    def __init__(self, model: PreTrainedModel, reads: Reads, layers: list[Layer]):
        super().__init__()
        self.model, self._reads, self._layers = model, reads, layers

    def forward(self, input_ids, attention_mask, position_ids, past, others):
        roles = ([kept.role for kept in layer] for layer in self._layers)
        cache = GraphCache([dict(zip(*pair, strict=True)) for pair in zip(roles, past, strict=True)])
        return (self.run(cache, input_ids, attention_mask, position_ids, others).logits, *cache.present())

    def run(self, cache, tokens, attention_mask, position_ids, others):
        rows = tokens[..., 0] if tokens.dim() == 3 else tokens
        with tracing(cache), tokens_of(rows), recurrences_as_nodes(self.model):
            return self._reads.call(
                self.model,
                {
                    self._reads.tokens[0]: tokens, "attention_mask": attention_mask, "position_ids": position_ids,
                    **others, "past_key_values": cache, "use_cache": True,
                },
            )  # fmt: skip


@dataclass(frozen=True)
class Traced:
    """Blocks, and the names of the values that go in and come out; `pasts` and `presents` by layer.

    Attributes:
        constants: tensors that the model's code made, by the names under which the blocks read them.
        pieces: weights that are parts of the model's, by name.
    """

    blocks: list[Block]
    ids: list[str]
    pasts: list[list[str]]
    logits: str
    presents: list[list[str]]
    vocab_size: int
    cache: list[Layer]
    constants: dict[str, torch.Tensor]
    pieces: dict[str, WeightView]


def trace_model(
    model: PreTrainedModel, aliases: dict[str, tuple[str, ...]], place: str, reads: Reads = TOKEN_IDS
) -> Traced:
    """Trace a model; of layers that do the same only the first is traced."""
    cache = _probe(model, place, reads)
    depth = len(cache)
    layers = _layers(model, aliases, cache, reads) if depth > 2 else None
    if layers is not None and layers.needed < depth:
        try:
            with _shortened(model, layers):
                traced = _trace_whole(model, aliases, cache[: layers.needed], place, reads)
            tensors, pieces = dict(_named_tensors(model)), dict(traced.pieces)
            for number, first in enumerate(layers.first[layers.needed :], layers.needed):
                pieces |= moved(traced.pieces, f"{layers.container}.{first}.", f"{layers.container}.{number}.")
            tensors |= {name: piece.of(tensors[piece.source]) for name, piece in pieces.items()}
            blocks, pasts, presents = stamp(traced.blocks, layers, traced.pasts, traced.presents, tensors)
            return replace(traced, blocks=blocks, pasts=pasts, presents=presents, cache=cache, pieces=pieces)
        except CaptureError:
            pass  # not a plain row of layers: what cannot be traced as a whole either is reported then
    return _trace_whole(model, aliases, cache, place, reads)


def _probe(model: PreTrainedModel, place: str, reads: Reads) -> list[Layer]:
    """What each layer keeps in its cache, found by running the model once without data."""
    fake, (ids, _, positions, _, others) = _fake(model, [], reads)
    mask = fake.from_tensor(torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64), static_shapes=True)
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if depth is None:  # models of several parts
        raise CaptureError(f"the config of {type(model).__name__} does not say how many layers it has", place=place)
    cache, before = ProbeCache(depth), _held(model)
    try:
        with fake, torch.no_grad(), quiet_transformers():
            made = _Flat(model, reads, []).run(cache, ids, mask, positions, others)
            if (listed := getattr(made, LISTED, None)) is not None:
                cache.found = dict(enumerate(kept_by_layer(listed)))
    except CaptureError as error:
        error.place = error.place or place
        raise
    except Exception as error:
        if isinstance(error, AttributeError) and isinstance(error.obj, GraphCacheLayer):
            refused = unknown_state(f"{error.name} in its cache")
            refused.place = place
            raise refused from error
        raise CaptureError(f"cannot be run without data: {root_cause(error)}", place=place) from error
    elsewhere = sorted(_held(model) - before)
    if elsewhere or not cache.found:
        what = f"{elsewhere[0]} is a state that it keeps in a module" if elsewhere else "it puts nothing into its cache"
        raise CaptureError(
            f"{what}: only keys and values, and states of convolutions and recurrences in the cache, are known",
            place=place, remedy="A state of another kind cannot be lowered",
        )  # fmt: skip
    if all(KEY in found for found in cache.found.values()):
        depth = len(cache.found)  # others, if any, read the keys and values of these
    return [kept_in(cache.found.get(number, {})) for number in range(depth)]


def _held(model: PreTrainedModel) -> set[str]:
    """Names of tensors that are plain attributes of modules, which is where some keep a state instead of in a cache."""
    return {
        f"{path}.{name}" for path, module in model.named_modules() for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }  # fmt: skip


def _trace_whole(model: PreTrainedModel, aliases, cache: list[Layer], place: str, reads: Reads) -> Traced:
    """Trace a model that has as many layers now as it has caches, and cut it into blocks."""
    from .explain import check_sizes  # which imports what is in here

    exported = _export(model, cache, place, reads)
    check_sizes(exported, model)
    own = dict(_named_tensors(model))
    whole, pieces = _normalized(exported, model, aliases)
    if without_form(whole.graph):
        whole, pieces = _normalized(decomposed(exported), model, aliases, in_core_aten=True)
    placeholders = [n.name for n in whole.graph.nodes if n.op == "placeholder"]
    front, behind = len(reads.in_front), len(placeholders) - len(reads.others)
    ids, pasts = placeholders[:front] + placeholders[behind:], by_layer(placeholders[front:behind], cache)
    results = results_of(whole.graph)
    read = {name: get_tensor(whole, name) for name in attributes(whole.graph)}
    constants = {name: tensor for name, tensor in read.items() if name not in own | pieces}
    logits, presents = results[0].name, by_layer([n.name for n in results[1:]], cache)
    blocks = cut(whole, [n.name for n in results])
    return Traced(blocks, ids, pasts, logits, presents, int(results[0].meta["val"].shape[-1]), cache, constants, pieces)


def _normalized(
    exported: ExportedProgram, model: PreTrainedModel, aliases: dict[str, tuple[str, ...]], in_core_aten: bool = False
) -> tuple[GraphModule, dict[str, WeightView]]:
    whole = exported.module(check_guards=False)
    _rename_weights(whole, aliases)
    pieces = cut_weights(whole, {name for name, _ in model.named_parameters(remove_duplicate=False)})
    to_normal_form(whole)
    fold_constants(whole, {*dict(_named_tensors(model)), *pieces})
    for node in whole.graph.nodes:  # what made the input of such a view contiguous was a no-op and is gone
        if node.target is aten._unsafe_view.default or (in_core_aten and node.target is aten.view.default):
            node.target = aten.reshape.default
    fuse_choices(whole.graph)
    fuse_written_attention(whole.graph)
    fuse_causal_convolutions(whole.graph)
    copy_experts(whole, pieces)
    whole.graph.eliminate_dead_code()
    return whole, pieces


def _fake(model: PreTrainedModel, cache: list[Layer], reads: Reads) -> tuple[FakeTensorMode, _Inputs]:
    """Give a model fake weights; returns their mode, and inputs of `_Flat`."""
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fake_parameters(model, fake)

    def example(dims: Dims, dtype=torch.float32):
        sizes = [size if isinstance(size, int) else _SIZES[size] for size in dims]
        return fake.from_tensor(torch.zeros(sizes, dtype=dtype), static_shapes=True)

    past = [[example(kept.shape(_BATCH, _PAST)) for kept in layer] for layer in cache]
    ids, mask, positions = (example(*given) for given in reads.in_front.values())
    return fake, (ids, mask, positions, past, {name: example(*given) for name, given in reads.others.items()})


def _named_tensors(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _layers(
    model: PreTrainedModel, aliases: dict[str, tuple[str, ...]], cache: list[Layer], reads: Reads
) -> LayerGroups | None:
    fake, arguments = _fake(model, cache, reads)
    names = {id(tensor): aliases.get(name, (name,))[0] for name, tensor in _named_tensors(model)}

    def run() -> None:
        with fake, quiet_transformers():
            _Flat(model, reads, cache)(*arguments)

    return find_layers(model, arguments[3], names, run)


@contextmanager
def _shortened(model: PreTrainedModel, layers: LayerGroups):
    """Only the layers that have to be traced."""
    path, _, leaf = layers.container.rpartition(".")
    owner, whole = model.get_submodule(path), model.get_submodule(layers.container)
    if not isinstance(whole, torch.nn.ModuleList):
        raise CaptureError("the layers are in no list", place=layers.container)
    setattr(owner, leaf, torch.nn.ModuleList(list(whole)[: layers.needed]))
    try:
        yield
    finally:
        setattr(owner, leaf, whole)


def _export(model: PreTrainedModel, cache: list[Layer], place: str, reads: Reads):
    _, arguments = _fake(model, cache, reads)
    dynamic = torch.export.Dim.DYNAMIC

    def free(dims: Dims) -> dict[int, Any]:
        return {axis: dynamic for axis, size in enumerate(dims) if isinstance(size, str)}

    front = zip(("input_ids", "attention_mask", "position_ids"), reads.in_front.values(), strict=True)
    pasts = [[dict.fromkeys(kept.free, dynamic) for kept in layer] for layer in cache]
    shapes = {
        **{name: free(dims) for name, (dims, _) in front}, "past": pasts,
        "others": {name: free(dims) for name, (dims, _) in reads.others.items()},
    }  # fmt: skip
    try:
        with torch.no_grad(), quiet_transformers():
            return torch.export.export(_Flat(model, reads, cache), arguments, dynamic_shapes=shapes, strict=False)
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises almost anything, and hides the reason behind other errors
        cause = root_cause(error)
        if "Constraints violated (L['input_ids'].size()[1])" in cause:
            raise CaptureError(
                "its code works out from the length of its cache which of the tokens are new ones: it is handed the "
                "whole text in every step",
                place=place, remedy="A step of a file reads the new tokens alone, and the cache",
            ) from error  # fmt: skip
        raise CaptureError(f"torch.export failed: {cause}", place=place, remedy=WITHOUT_CACHE) from error


def _rename_weights(whole: GraphModule, aliases: dict[str, tuple[str, ...]]) -> None:
    """Give get_attr nodes and module paths the checkpoint's names; tied weights go by one of them."""
    for node in whole.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta[Meta.MODULE_PATH] = next(reversed(stack.values()))[0].removeprefix("model.") if stack else ""
        if node.op == "get_attr":
            old = tensor_name(node)
            name = old.removeprefix("model.")
            name = aliases.get(name, (name,))[0]
            if name != old:
                set_tensor(whole, name, get_tensor(whole, old))
                node.target = name


