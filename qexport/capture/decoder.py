"""Capturing a causal language model of transformers: one graph for prefill and decoding, no weights loaded."""

import tempfile
import weakref
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from .. import ops  # noqa: F401  registers the operators
from ..errors import CaptureError
from ..garbage import no_garbage_collection
from ..passes.edit import get_tensor
from .attention import IMPLEMENTATION
from .graph import Captured, Port
from .source import ModelFolder, load_in_memory
from .trace import IDS, Traced, cache_shape, own_attention, quiet, root_cause, trace
from .weights import Checkpoint, check_shapes


@no_garbage_collection()
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
    traced = trace(model, aliases, folder.name)
    used = {n: tuple(get_tensor(b.module, n).shape) for b in traced.blocks for n in b.parameters}
    buffers = {n: b for n, b in model.named_buffers() if n in used}
    parameters = {n: s for n, s in used.items() if n not in buffers}
    weights = _checkpoint(checkpoint, folder, model, parameters, aliases)
    settings = _settings(folder.config, traced.vocab_size)
    inputs, outputs = _ports(traced, settings)
    return Captured(
        kind="decoder",
        blocks=traced.blocks,
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
        with init_empty_weights(include_buffers=False), quiet():
            model = AutoModelForCausalLM.from_config(
                folder.config, attn_implementation=IMPLEMENTATION, dtype=torch.float32,
                trust_remote_code=folder.trust_remote_code,
            )  # fmt: skip
    except (ValueError, KeyError, ImportError) as error:
        if isinstance(error, KeyError) and error.args == (IMPLEMENTATION,):  # looked up among its own attention classes
            raise own_attention(folder.name) from error
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


def _settings(config, vocab_size: int) -> dict[str, int]:
    kv_heads, head_dim = cache_shape(config)
    context = getattr(config, "max_position_embeddings", None)
    return {
        **({"max_position_embeddings": context} if isinstance(context, int) else {}),
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": config.hidden_size,
        "vocab_size": vocab_size,
    }


def _ports(traced: Traced, settings: dict[str, int]) -> tuple[list[Port], list[Port]]:
    """The interface of the model, whose order is that of the ONNX file."""

    def cache(prefix: str, names: list[list[str]], length: str) -> list[Port]:
        dims = ("batch", settings["num_key_value_heads"], length, settings["head_dim"])
        pairs = [
            (f"{prefix}.{i}.{part}", n)
            for i, both in enumerate(names)
            for part, n in zip(("key", "value"), both, strict=True)
        ]
        return [Port(name, value, torch.float32, dims) for name, value in pairs]

    ids = [
        Port(name, value, torch.int64, ("batch", dim))
        for (name, dim), value in zip(IDS.items(), traced.ids, strict=True)
    ]
    logits = Port("logits", traced.logits, torch.float32, ("batch", "sequence", settings["vocab_size"]))
    return (
        [*ids, *cache("past_key_values", traced.pasts, "past")],
        [logits, *cache("present", traced.presents, "total")],
    )
