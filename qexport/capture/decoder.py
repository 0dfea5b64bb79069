"""Capturing a causal language model of transformers: one graph for prefill and decoding, no weights loaded."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..artifact.cache_names import present_of
from ..errors import CaptureError, root_cause
from ..gc_pause import no_garbage_collection
from ..graph import ops  # noqa: F401  registers the operators
from ..graph.edit import get_tensor
from ..models.checkpoint import Checkpoint
from ..models.quiet import quiet_transformers
from ..models.source import ModelFolder
from ..models.steps import without_rescaling
from ..models.tokens import embedding_rows, tokens_without_rows
from ..models.transformers_witness.decoder import DecoderWitness
from ..models.witness import Witness
from .attention import IMPLEMENTATION
from .experts import IMPLEMENTATION as EXPERTS
from .graph import BATCH, CapturedModel, Port
from .kept import PAST, TOTAL, first_keys, kept_ports, layer_settings
from .languages import one_language
from .rope import longest_text, settle_frequencies
from .stored import aliases_of, codes_in, convert_names, find_weights, note_cache_scales, stored_tables, untie
from .trace import TOKEN_IDS, Reads, Traced, trace_model
from .weight_views import WeightViews

_LONGEST = ("max_position_embeddings", "max_seq_len", "seq_length")  # what configs call the longest text


@no_garbage_collection()
def capture_decoder(
    folder: ModelFolder,
    loader: type[Any] = AutoModelForCausalLM,
    reads: Callable[[PreTrainedModel], Reads] = lambda model: TOKEN_IDS,
    witness: Witness | None = None,
) -> CapturedModel:
    """Capture the model of a folder as float32 blocks.

    The inputs are input_ids, attention_mask, position_ids and what layers keep: past_key_values.{i}.key/value, keys of
    an indexer (past_indexer.{i}), the inputs of a convolution (past_conv.{i}) and the state of a recurrence
    (past_recurrent.{i}); the outputs logits and the same behind the new tokens (present.{i}.key/value,
    present_indexer.{i}, present_conv.{i}, present_recurrent.{i}). Batch, sequence and past are dynamic, 1 and 0
    included.

    Args:
        loader: an auto class of transformers whose models are built.
        reads: what a model that was built reads in the place of token ids.
        witness: who else can say what it computes; None: transformers' model on token ids.

    Raises:
        CaptureError: torch.export cannot follow the model, or the checkpoint does not fit its config.
    """
    # A damaged file is reported before the slow part.
    checkpoint = Checkpoint(folder.path, folder.stated_weights, folder.codes, folder.adapter)
    model = _empty_model(folder, loader)
    given_reads = reads(model)
    convert_names(checkpoint, folder, model)
    notes = untie(model, checkpoint)
    aliases = aliases_of(model)
    with one_language(model, folder.name) as one:
        traced = trace_model(model, aliases, folder.name, given_reads)
    used = {n: tuple(get_tensor(b.module, n).shape) for b in traced.blocks for n in b.parameters}
    buffers = {n: b.detach() for n, b in model.named_buffers() if n in used}
    buffers |= {n: t.detach() for n, t in traced.constants.items() if n in used}
    parameters = [n for n in used if n not in buffers]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    sources = {traced.pieces[n].source if n in traced.pieces else n for n in parameters}
    read = {n: shapes[n] for n in sorted(sources)}
    if folder.codes is not None and folder.codes.cache_numbers:
        note_cache_scales(traced.blocks, checkpoint)
    stored, left_out = find_weights(checkpoint, folder, model, read, buffers, aliases)
    buffers, parameters = {n: b for n, b in buffers.items() if n not in stored}, [*parameters, *stored]
    buffers |= stored_tables(checkpoint, model, buffers)
    given = codes_in(checkpoint, parameters, traced.pieces)
    settings, rows = _settings(folder.config.get_text_config(), traced), embedding_rows(model)
    inputs, outputs = _ports(traced, settings, given_reads)
    return CapturedModel(
        kind="decoder",
        blocks=traced.blocks,
        inputs=inputs,
        outputs=outputs,
        weights=WeightViews(checkpoint, traced.pieces) if traced.pieces else checkpoint,
        constants=buffers,
        settings=settings,
        folder=folder,
        tied={n: tuple(a for a in aliases.get(n, ()) if a != n) for n in parameters},
        notes=[*notes, *one, *checkpoint.notes, *tokens_without_rows(folder.tokenizer(), rows)],
        left_out=left_out,
        given=given,
        witness=witness or DecoderWitness(folder),
    )


def _empty_model(folder: ModelFolder, loader: type[Any]) -> PreTrainedModel:
    def build(attention: str) -> PreTrainedModel:
        with init_empty_weights(include_buffers=False), quiet_transformers():
            return loader.from_config(
                folder.config, attn_implementation=attention, dtype=torch.float32,
                trust_remote_code=folder.trust_remote_code,
            )  # fmt: skip

    try:
        try:
            model = build(IMPLEMENTATION)
        except KeyError as error:
            if error.args != (IMPLEMENTATION,):
                raise
            # It has attention classes of its own to look it up in: the one written out, with our mask.
            model = build("eager")
            model.config._attn_implementation = IMPLEMENTATION
    except Exception as error:  # whatever a model's code makes of a config
        raise CaptureError(
            f"transformers cannot build it as a causal language model ({root_cause(error)})", place=folder.name,
            remedy="For other kinds of model pass an nn.Module and example inputs",
        ) from error  # fmt: skip
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = EXPERTS
    without_rescaling(model)
    settle_frequencies(model, folder.name)
    model.tie_weights()
    return model.eval()


def _settings(config, traced: Traced) -> dict[str, Any]:
    stated = (getattr(config, name, None) for name in _LONGEST)
    attention = {}
    if (keys := first_keys(traced.cache)) is not None:
        heads, width = keys
        attention["num_attention_heads"] = getattr(config, "num_attention_heads", heads)
        attention |= {"num_key_value_heads": heads, "head_dim": width}
    context = longest_text(config) or next((length for length in stated if isinstance(length, int)), None)
    return {
        **({"max_position_embeddings": context} if context else {}),
        "num_hidden_layers": config.num_hidden_layers,
        **attention,
        "hidden_size": config.hidden_size,
        "vocab_size": traced.vocab_size,
        **layer_settings(traced.cache),
    }


def _ports(traced: Traced, settings: dict[str, Any], reads: Reads) -> tuple[list[Port], list[Port]]:
    """The interface of the model, whose order is that of the ONNX file.

    A mask that nothing reads is none of its inputs, as padding would be read as text.
    """
    named, read = {**reads.in_front, **reads.others}, {name for block in traced.blocks for name in block.inputs}
    ids = [
        Port(name, value, dtype, dims)
        for (name, (dims, dtype)), value in zip(named.items(), traced.ids, strict=True)
        if name != "attention_mask" or value in read
    ]
    logits = Port("logits", traced.logits, torch.float32, (BATCH, "sequence_length", settings["vocab_size"]))
    pasts, presents = (
        kept_ports(names, traced.cache, length) for names, length in ((traced.pasts, PAST), (traced.presents, TOTAL))
    )
    return [*ids, *pasts], [logits, *(replace(port, name=present_of(port.name)) for port in presents)]
