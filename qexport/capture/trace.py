"""Tracing a language model into blocks: through torch.export, one layer of every kind."""

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..errors import CaptureError
from ..passes.edit import get_tensor, set_tensor
from .alike import Layers, find_layers
from .attention import GraphCache, tracing
from .blocks import Block, cut
from .normalize import normalize
from .stamp import stamp

# Sizes of the example inputs. torch.export specialises 0 and 1, and two dimensions of one size could be taken for the
# same one; the graph it makes with these is right for every size, 0 and 1 included.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5
IDS = {"input_ids": "sequence", "attention_mask": "total", "position_ids": "sequence"}  # and their second dimension


class _Flat(torch.nn.Module):
    """The model with every input and output a plain tensor."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        with tracing(GraphCache(past)) as cache:
            out = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
        return (out.logits, *cache.present())


@dataclass(frozen=True)
class Traced:
    """Blocks, and the names of the values that go in and come out; `pasts` and `presents` by layer."""

    blocks: list[Block]
    ids: list[str]
    pasts: list[list[str]]
    logits: str
    presents: list[list[str]]
    vocab_size: int


def trace(model: torch.nn.Module, aliases: dict[str, tuple[str, ...]], place: str) -> Traced:
    """Trace a model; of layers that do the same only the first is traced."""
    depth = model.config.num_hidden_layers
    layers = _layers(model, aliases) if depth > 2 else None
    if layers is not None and layers.needed < depth:
        try:
            with _shortened(model, layers):
                traced = _trace_whole(model, aliases, layers.needed, place)
            blocks, pasts, presents = stamp(
                traced.blocks, layers, traced.pasts, traced.presents, dict(_named_tensors(model))
            )
            return replace(traced, blocks=blocks, pasts=pasts, presents=presents)
        except CaptureError:
            pass  # not a plain row of layers: what cannot be traced as a whole either is reported then
    return _trace_whole(model, aliases, depth, place)


def _trace_whole(model: torch.nn.Module, aliases, depth: int, place: str) -> Traced:
    """Trace a model that has `depth` layers now, and cut it into blocks."""
    whole = _export(model, depth, place).module(check_guards=False)
    _rename_weights(whole, aliases)
    normalize(whole)
    ids, pasts = _by_layer([n.name for n in whole.graph.nodes if n.op == "placeholder"], len(IDS))
    results = whole.graph.output_node().args[0]
    (logits,), presents = _by_layer([n.name for n in results], 1)
    blocks = cut(whole, [n.name for n in results])
    return Traced(blocks, ids, pasts, logits, presents, int(results[0].meta["val"].shape[-1]))


def _by_layer(names: list[str], others: int) -> tuple[list[str], list[list[str]]]:
    """The first names, and the rest in pairs of key and value."""
    return names[:others], [names[i : i + 2] for i in range(others, len(names), 2)]


def _fake(model: torch.nn.Module, depth: int) -> tuple[FakeTensorMode, tuple[torch.Tensor, ...]]:
    """Give a model fake weights; returns their mode, and inputs of `_Flat` with the caches of `depth` layers."""
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    twins: dict[int, torch.nn.Parameter] = {}
    with fake:
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            owner, _, leaf = name.rpartition(".")
            if id(parameter) not in twins:
                twins[id(parameter)] = torch.nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False
                )
            setattr(model.get_submodule(owner), leaf, twins[id(parameter)])

    def example(*shape, dtype=torch.int64):
        return fake.from_tensor(torch.zeros(shape, dtype=dtype), static_shapes=True)

    kv_heads, head_dim = cache_shape(model.config)
    past = [example(_BATCH, kv_heads, _PAST, head_dim, dtype=torch.float32) for _ in range(2 * depth)]
    return fake, (example(_BATCH, _SEQUENCE), example(_BATCH, _PAST + _SEQUENCE), example(_BATCH, _SEQUENCE), past)


def _named_tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _layers(model: torch.nn.Module, aliases: dict[str, tuple[str, ...]]) -> Layers | None:
    fake, arguments = _fake(model, model.config.num_hidden_layers)
    caches = [arguments[3][i : i + 2] for i in range(0, len(arguments[3]), 2)]
    names = {id(tensor): aliases.get(name, (name,))[0] for name, tensor in _named_tensors(model)}

    def run() -> None:
        with fake:
            _Flat(model)(*arguments)

    return find_layers(model, caches, names, run)


@contextmanager
def _shortened(model: torch.nn.Module, layers: Layers):
    """Only the layers that have to be traced."""
    owner, _, leaf = layers.container.rpartition(".")
    owner, whole = model.get_submodule(owner), model.get_submodule(layers.container)
    setattr(owner, leaf, torch.nn.ModuleList(list(whole)[: layers.needed]))
    try:
        yield
    finally:
        setattr(owner, leaf, whole)


def _export(model: torch.nn.Module, depth: int, place: str):
    _, arguments = _fake(model, depth)
    dynamic = torch.export.Dim.DYNAMIC
    two = {0: dynamic, 1: dynamic}
    shapes = {**dict.fromkeys(IDS, two), "past": [{0: dynamic, 2: dynamic} for _ in arguments[3]]}
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(_Flat(model), arguments, dynamic_shapes=shapes, strict=False)
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises almost anything, and hides the reason behind other errors
        # Asked only now: a few models that do follow the interface are not marked as such.
        if not getattr(model, "_supports_attention_backend", True):
            raise own_attention(place) from error
        raise CaptureError(f"torch.export failed: {root_cause(error)}", place=place) from error


def own_attention(place: str) -> CaptureError:
    return CaptureError(
        "its attention does not go through transformers' AttentionInterface (ALiBi and other attention of its own)",
        place=place, remedy="Such a model cannot be captured with its cache",
    )  # fmt: skip


def root_cause(error: BaseException) -> str:
    """The first line of the innermost error of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def cache_shape(config) -> tuple[int, int]:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _rename_weights(whole: torch.fx.GraphModule, aliases: dict[str, tuple[str, ...]]) -> None:
    """Give get_attr nodes and module paths the checkpoint's names; tied weights go by one of them."""
    for node in whole.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["module_path"] = next(reversed(stack.values()))[0].removeprefix("model.") if stack else ""
        if node.op == "get_attr":
            name = node.target.removeprefix("model.")
            name = aliases.get(name, (name,))[0]
            if name != node.target:
                set_tensor(whole, name, get_tensor(whole, node.target))
                node.target = name


@contextmanager
def quiet():
    """Without the warnings and log lines of libraries about things the user cannot change."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
