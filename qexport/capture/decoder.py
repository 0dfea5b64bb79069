"""Capturing a causal language model of transformers: one graph for prefill and decoding, no weights loaded."""

import gc
import logging
import tempfile
import warnings
import weakref
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoModelForCausalLM

from .. import ops  # noqa: F401  registers the operators
from ..errors import CaptureError
from ..passes.edit import get_tensor, set_tensor
from .attention import IMPLEMENTATION, GraphCache, tracing
from .blocks import cut
from .graph import Captured, Port
from .normalize import normalize
from .source import ModelFolder, load_in_memory
from .weights import Checkpoint, check_shapes

# Sizes of the example inputs. torch.export specialises 0 and 1, and two dimensions of one size could be taken for the
# same one; the graph it makes with these is right for every size, 0 and 1 included.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5


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


@contextmanager
def _no_garbage_collection():
    """Tracing makes millions of objects that live to its end; looking for cycles among them takes long."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@_no_garbage_collection()
def capture_decoder(folder: ModelFolder) -> Captured:
    """Capture the model of a folder as float32 blocks.

    The inputs are input_ids, attention_mask, position_ids and past_key_values.{i}.key/value, the outputs logits and
    present.{i}.key/value; batch, sequence and past are dynamic, 1 and 0 included.

    Raises:
        CaptureError: torch.export cannot follow the model, or the checkpoint does not fit its config.
    """
    checkpoint = Checkpoint(folder.path)  # before the slow part: a damaged file is reported at once
    model = _empty_model(folder)
    aliases = _aliases(model)
    exported = _export(model, folder.name)
    whole = exported.module(check_guards=False)
    _rename_weights(whole, aliases)
    normalize(whole)

    used = {n.target: tuple(n.meta["val"].shape) for n in whole.graph.nodes if n.op == "get_attr"}
    buffers = {n: b for n, b in model.named_buffers() if n in used}
    parameters = {n: s for n, s in used.items() if n not in buffers}
    weights = _checkpoint(checkpoint, folder, model, parameters, aliases)
    settings = _settings(folder.config, whole)
    inputs, outputs = _ports(whole, settings)
    return Captured(
        kind="decoder",
        blocks=cut(whole, [port.value for port in outputs]),
        inputs=inputs,
        outputs=outputs,
        weights=weights,
        constants={n: b.detach() for n, b in buffers.items()},
        settings=settings,
        folder=folder,
        tied={n: tuple(a for a in aliases[n] if a != n) for n in parameters},
    )


def _empty_model(folder: ModelFolder) -> torch.nn.Module:
    try:
        with init_empty_weights(include_buffers=False), _quiet():
            model = AutoModelForCausalLM.from_config(
                folder.config, attn_implementation=IMPLEMENTATION, dtype=torch.float32,
                trust_remote_code=folder.trust_remote_code,
            )  # fmt: skip
    except (ValueError, KeyError, ImportError) as error:
        if isinstance(error, KeyError) and error.args == (IMPLEMENTATION,):  # looked up among its own attention classes
            raise _own_attention(folder.name) from error
        raise CaptureError(
            f"transformers cannot build it as a causal language model ({root_cause(error)})", place=folder.name,
            remedy="For other kinds of model pass an nn.Module and example inputs",
        ) from error  # fmt: skip
    model.tie_weights()
    return model.eval()


def _aliases(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter name all names of the same tensor, the one that comes first in the model first."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


def _export(model: torch.nn.Module, place: str):
    config, fake = model.config, FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
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

    kv_heads, head_dim = _cache_shape(config)
    past = [
        example(_BATCH, kv_heads, _PAST, head_dim, dtype=torch.float32) for _ in range(2 * config.num_hidden_layers)
    ]
    arguments = (example(_BATCH, _SEQUENCE), example(_BATCH, _PAST + _SEQUENCE), example(_BATCH, _SEQUENCE), past)
    dynamic = torch.export.Dim.DYNAMIC
    two = {0: dynamic, 1: dynamic}
    shapes = {
        "input_ids": two,
        "attention_mask": two,
        "position_ids": two,
        "past": [{0: dynamic, 2: dynamic} for _ in past],
    }
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(_Flat(model), arguments, dynamic_shapes=shapes, strict=False)
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises almost anything, and hides the reason behind other errors
        # Asked only now: a few models that do follow the interface are not marked as such.
        if not getattr(model, "_supports_attention_backend", True):
            raise _own_attention(place) from error
        raise CaptureError(f"torch.export failed: {root_cause(error)}", place=place) from error


def _own_attention(place: str) -> CaptureError:
    return CaptureError(
        "its attention does not go through transformers' AttentionInterface (ALiBi and other attention of its own)",
        place=place, remedy="Such a model cannot be captured with its cache",
    )  # fmt: skip


def root_cause(error: BaseException) -> str:
    """The first line of the innermost error of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _cache_shape(config) -> tuple[int, int]:
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


def _checkpoint(
    checkpoint: Checkpoint, folder: ModelFolder, model, parameters: dict[str, tuple[int, ...]], aliases
) -> Checkpoint:
    """The checkpoint with every parameter found in it, converted by transformers where its names are others."""
    wanted = {name: aliases.get(name, ()) for name in parameters}
    prefix = getattr(model, "base_model_prefix", "")
    missing = checkpoint.resolve(wanted, prefix)
    if missing:
        temporary = tempfile.TemporaryDirectory(prefix="qexport-")
        checkpoint = Checkpoint(load_in_memory(folder, Path(temporary.name)))
        weakref.finalize(checkpoint, temporary.cleanup)
        missing = checkpoint.resolve(wanted, prefix)
    if missing:
        raise CaptureError(
            f"{len(missing)} weights are not in the checkpoint, first {missing[0]}", place=str(folder.path)
        )
    check_shapes(checkpoint, parameters)
    return checkpoint


def _settings(config, whole: torch.fx.GraphModule) -> dict[str, int]:
    kv_heads, head_dim = _cache_shape(config)
    logits = next(n for n in whole.graph.nodes if n.op == "output").args[0][0]
    context = getattr(config, "max_position_embeddings", None)
    return {
        **({"max_position_embeddings": context} if isinstance(context, int) else {}),
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": config.hidden_size,
        "vocab_size": int(logits.meta["val"].shape[-1]),
    }


def _ports(whole: torch.fx.GraphModule, settings: dict[str, int]) -> tuple[list[Port], list[Port]]:
    placeholders = [n.name for n in whole.graph.nodes if n.op == "placeholder"]
    results = [n.name for n in next(n for n in whole.graph.nodes if n.op == "output").args[0]]
    long, real = torch.int64, torch.float32
    cache = lambda length: ("batch", settings["num_key_value_heads"], length, settings["head_dim"])  # noqa: E731
    layers = [(i, part) for i in range(settings["num_hidden_layers"]) for part in ("key", "value")]
    ids = [("input_ids", "sequence"), ("attention_mask", "total"), ("position_ids", "sequence")]
    inputs = [Port(name, value, long, ("batch", dim)) for (name, dim), value in zip(ids, placeholders, strict=False)]
    inputs += [
        Port(f"past_key_values.{i}.{part}", value, real, cache("past"))
        for (i, part), value in zip(layers, placeholders[3:], strict=True)
    ]
    outputs = [Port("logits", results[0], real, ("batch", "sequence", settings["vocab_size"]))]
    outputs += [
        Port(f"present.{i}.{part}", value, real, cache("total"))
        for (i, part), value in zip(layers, results[1:], strict=True)
    ]
    return inputs, outputs


@contextmanager
def _quiet():
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
