"""A decoder session with its key/value cache: prefill, then a token at a time, the cache staying where it is made."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime as ort

from ..artifact import manifest as manifests
from ..artifact.adapter_files import adapter_path, read_adapter
from ..artifact.cache_names import TOKEN_IDS, is_past, is_state, present_of
from ..artifact.manifest import CUDA, Manifest
from ..errors import InputError, RuntimeProblem
from . import cuda_graph
from .cuda_graph import RecordedStep
from .drafts import Drafts
from .embeddings import Embeds, reads_embeddings
from .provider import chosen_provider, device_of
from .row_cost import UNKNOWN, RowCost, row_cost
from .sampling import Sampling
from .session import open_session
from .values import ELEMENT_TYPES, array_of, picked, shortened, zeros
from .writing import Choice, Generation, write

logger = logging.getLogger(__name__)


class Decoder:
    """A decoder session and the cache of one batch.

    The cache stays in OrtValues on the device of the session: the present of one run is bound as the past of the next.

    Args:
        session: session on a file with the decoder interface (see `Manifest`).
        settings: the manifest's settings. num_key_value_heads and head_dim size the cache where the file's shapes are
            symbolic; with past_present_share_buffer the file writes present into the buffer that past came in.
        max_length: length of a shared buffer in tokens; with separate past and present it has no effect.
        records: whether steps behind a prompt become a CUDA graph. The session has `cuda_graph.OPTIONS` then.
        factors: of an adapter, by the names of their inputs.
        embed: makes what a file reads that has no table of tokens.
        row_cost: what several tokens in a call cost.

    Raises:
        InputError: the file does not have the interface, or a shared cache has no max_length; it reads embeddings, and
            nothing makes them.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        settings: Mapping[str, Any] | None = None,
        *,
        max_length: int | None = None,
        records: bool = False,
        factors: Mapping[str, ort.OrtValue] = MappingProxyType({}),
        embed: Embeds | None = None,
        row_cost: RowCost = UNKNOWN,
    ):
        settings, self.row_cost = settings or {}, row_cost
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = {value.name for value in session.get_outputs()}
        self._pasts = [name for name in inputs if is_past(name)]
        presents = [present_of(name) for name in self._pasts]
        if embed is None and reads_embeddings(session):
            raise InputError(
                "reads embeddings, which another part of the model makes of tokens and pictures",
                remedy="Give the folder that holds all its parts",
            )
        self._embed, made = embed, {TOKEN_IDS} if embed is None else embed.makes
        missing = made - set(inputs) | {"logits", *presents} - outputs
        if missing or not self._pasts:
            raise InputError(
                f"not a decoder: {', '.join(sorted(missing)) or 'past_key_values'} is missing",
                remedy="generate and bench need a model exported as a causal language model",
            )
        self._share = bool(settings.get("past_present_share_buffer", False))
        if self._share and max_length is None:
            raise InputError("a file with a shared cache needs max_length")
        self._session, self._outputs = session, ["logits", *presents]
        self._all_logits = next(v.shape[1] for v in session.get_outputs() if v.name == "logits") != 1
        self._has_positions, self._has_mask = "position_ids" in inputs, "attention_mask" in inputs
        # Of pictures a token has a place in time, height and width, which of text are one.
        self._axes = inputs["position_ids"].shape[:-2] if self._has_positions else []
        self._counts_padding = settings.get("padding_counts", False)
        hidden = self._has_mask and not self._counts_padding
        self._takes_padding = hidden and (self._has_positions or settings.get("attention") == "grouped")
        self._others = set(inputs) - {"attention_mask", "position_ids", *made, *self._pasts}
        self._given: dict[str, ort.OrtValue] = dict(factors)
        self._factors = factors
        sizes = {1: settings.get("num_key_value_heads"), 3: settings.get("head_dim")}
        self._states = {name: inputs[name].shape[1:] for name in self._pasts if is_state(name)}
        self._sizes: dict[str, dict[int, Any]] = {
            name: {i: dim if isinstance(dim := inputs[name].shape[i], int) else sizes[i] for i in sizes}
            for name in self._pasts
            if name not in self._states
        }
        if any(size is None for dims in self._sizes.values() for size in dims.values()):
            raise InputError("the cache has symbolic shapes, and the settings give no num_key_value_heads and head_dim")
        self._cache_type = ELEMENT_TYPES[inputs[self._pasts[0]].type]
        self._device = device_of(session)
        self._max_length = max_length
        self._binding: ort.IOBinding | None = None  # of a shared cache, kept from run to run
        self._run_options = cuda_graph.unrecorded() if records else None
        self._step: RecordedStep | None = None  # of a batch size, as the cache
        self._records = records and self._share and embed is None
        self._vocab = int(settings["vocab_size"]) if self._records else 0
        self._cache: list[ort.OrtValue] = []
        self.reset()

    @property
    def past(self) -> int:
        """Tokens in the cache, padding included."""
        return self._past

    @property
    def has_all_logits(self) -> bool:
        """Whether a run returns the logits behind each token, and not behind the last alone."""
        return self._all_logits

    @property
    def recorded(self) -> bool:
        """Whether steps are a CUDA graph."""
        return self._records

    def reset(self) -> None:
        """Forget the batch. A shared cache keeps its memory: no run reads beyond the tokens it was given."""
        self._past, self._real = 0, np.zeros(0, np.int64)
        self._mask = np.ones((0, 0), np.int64)
        if not self._share:
            self._cache = []
        elif self._states:  # which every run reads
            self._binding = None

    @property
    def forgets(self) -> bool:
        """Whether it can forget the last tokens: states of convolutions and recurrences hold what all of them left."""
        return not self._states

    def cut(self, length: int) -> None:
        """Forget the tokens behind the first `length`, padding included, of every row.

        Raises:
            InputError: there are fewer, or it keeps states that hold them.
        """
        if not self.forgets:
            raise InputError("it keeps states of layers, which cannot forget the last tokens", remedy="Call reset()")
        if not 0 < length <= self._past:
            raise InputError(f"{length} of {self._past} tokens cannot be kept", remedy="Call reset() to forget all")
        dropped, self._past = self._past - length, length
        self._real = self._real - dropped
        if dropped and not self._share:  # of a shared cache no run reads beyond its mask
            self._cache = [shortened(value, length, self._cache_type, self._device) for value in self._cache]

    def pick(self, rows: Sequence[int]) -> None:
        """Let every row of the batch go on from another one, as beams do.

        Args:
            rows: of the batch, for each row the one whose tokens it takes over.

        Raises:
            InputError: its cache is a shared buffer.
        """
        if self._share:
            raise InputError("rows of a shared cache cannot be reordered", remedy="Export with --attention standard")
        self._cache = [picked(value, rows, self._cache_type, self._device) for value in self._cache]
        self._real = self._real[list(rows)]
        self._mask = self._mask[list(rows)]

    def give(self, values: Mapping[str, ort.OrtValue]) -> None:
        """Set the inputs that stay the same from run to run: what a decoder of an encoder-decoder reads of its source.

        The batch is forgotten.

        Raises:
            InputError: one is missing.
        """
        if missing := self._others - values.keys():
            raise InputError(f"{min(missing)} is missing", remedy="Read a source first")
        self._given = {name: values[name] for name in self._others} | dict(self._factors)
        self._step = None
        self.reset()

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens to the cache and return the logits behind each of them.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: 1 for tokens and 0 for padding, [batch, sequence], the new tokens only; padding is on the
                left of the first call. All ones when absent.

        Returns:
            logits, [batch, sequence, vocab], or [batch, 1, vocab] from a file that computes those of the last token
            alone, in the dtype of the file: memory of the session, valid until released. Those of a bfloat16 file are
            copied to float32.

        Raises:
            InputError: shapes that do not fit, padding elsewhere, or more tokens than a shared cache holds.
            RuntimeProblem: ONNX Runtime fails.
        """
        ids = np.ascontiguousarray(input_ids, np.int64)
        new = None if attention_mask is None else np.ascontiguousarray(attention_mask, np.int64)
        self._check(ids, new)
        mask, positions = self._append(ids, new)
        if self._records and self._past and ids.shape[1] == 1 and len(ids) == self._cache[0].shape()[0]:
            return self._recorded(ids, mask, positions)
        binding = self._bind(len(ids))
        if self._has_mask:
            binding.bind_cpu_input("attention_mask", mask)
        if self._has_positions:
            binding.bind_cpu_input("position_ids", np.tile(positions, (*self._axes, 1, 1)))
        if self._embed is None:
            binding.bind_cpu_input(TOKEN_IDS, ids)
        else:  # which may have positions of its own
            held = self._embed(ids, positions)
            for name, value in held.items():
                binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # onnxruntime has one exception class for each status code and no base class
            raise RuntimeProblem(f"the decoder failed after {self.past} tokens: {error}") from error
        self._past = mask.shape[1]
        self._real = positions[:, -1] + 1
        if self._share:
            return array_of(ort.OrtValue(binding.get_outputs_as_ortvaluevector()[0]))
        logits, *self._cache = binding.get_outputs()
        return array_of(logits)

    def _recorded(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """A step of a batch whose cache is on the device, by its CUDA graph."""
        try:
            if self._step is None:
                cache = dict(zip(self._pasts, self._cache, strict=True))
                self._step = RecordedStep(self._session, cache, self._given, self._vocab)
            logits = self._step.run(ids, mask, positions)
        except Exception as error:  # onnxruntime has one exception class for each status code and no base class
            raise RuntimeProblem(f"the decoder failed after {self.past} tokens: {error}") from error
        self._past, self._real = mask.shape[1], positions[:, -1] + 1
        return logits

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int = 0,
        sampling: Sampling | None = None,
        on_token: Callable[[int, int], None] | None = None,
        never: Sequence[int] = (),
        never_first: Sequence[int] = (),
        drafts: Drafts | None = None,
    ) -> Generation:
        """Continue a batch of prompts; the cache starts empty.

        Args:
            prompts: token ids, one list a row; shorter ones are padded on the left.
            max_new_tokens: new tokens a row gets at most.
            eos_token_ids: tokens that end a row.
            pad_token_id: id to fill up with; masked, so any valid id will do.
            sampling: how to draw; None takes the likeliest token. The same seed draws the same tokens, and a row
                draws the same whatever rows are beside it.
            on_token: called as on_token(row, token) for each new token.
            never: tokens that are not written; never_first: nor these as the first new one.
            drafts: guess the next tokens of a single prompt and read them together; see `drafts`.

        Raises:
            InputError: an empty batch or prompt, or prompts of different length for a file without position_ids; drafts
                for several prompts, or for a file that computes the logits of the last token alone.
        """
        return write(
            self, prompts, max_new_tokens=max_new_tokens, ends=eos_token_ids, pad=pad_token_id,
            choice=Choice(sampling, len(prompts), tuple(never), tuple(never_first)), on_token=on_token, drafts=drafts,
        )  # fmt: skip

    def _check(self, ids: np.ndarray, mask: np.ndarray | None) -> None:
        if ids.ndim != 2 or 0 in ids.shape or (mask is not None and ids.shape != mask.shape):
            shape = ids.shape if mask is None else mask.shape
            raise InputError(f"input_ids {ids.shape} and attention_mask {shape} must both be [batch, sequence]")
        if missing := self._others - self._given.keys():
            raise InputError(f"{min(missing)} is missing", remedy="Read a source first")
        if self._past and len(ids) != len(self._real):
            raise InputError(f"the cache holds {len(self._real)} rows, the input {len(ids)}", remedy="Call reset()")
        if mask is not None and not mask.all():
            if self._past or (np.diff(mask, axis=1) < 0).any() or not mask[:, -1].all():
                raise InputError("padding belongs on the left of the first tokens")
            if not self._takes_padding:
                why = "computes positions itself" if self._has_mask else "has no attention mask"
                why = "puts padding into summaries of tokens" if self._counts_padding else why
                raise InputError(
                    f"this file {why}, so it cannot take padding",
                    remedy="Run prompts of different length one by one",
                )
        if self._share and self._past + ids.shape[1] > self._max_length:
            raise InputError(f"{self._past + ids.shape[1]} tokens do not fit into a cache of {self._max_length}")

    def _append(self, ids: np.ndarray, new: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The mask of all tokens [batch, past + sequence], and the positions of the new ones [batch, sequence]."""
        batch, total = len(ids), self._past + ids.shape[1]
        real = self._real if self._past else np.zeros(batch, np.int64)
        counted = np.arange(1, ids.shape[1] + 1) if new is None else np.cumsum(new, axis=1)
        positions = np.maximum(real[:, None] + counted - 1, 0)
        if not self._past:
            self._mask = np.ones((batch, 0), np.int64)
        if self._mask.shape[1] < total:  # with room for many more, as a step should not copy what it adds a one to
            old, self._mask = self._mask, np.ones((batch, max(2 * total, 256)), np.int64)
            self._mask[:, : old.shape[1]] = old
        if new is not None:
            self._mask[:, self._past : total] = new
        return np.ascontiguousarray(self._mask[:, :total]), positions

    def _bind(self, batch: int) -> ort.IOBinding:
        """A binding with the cache in it; a shared one is bound once for all runs of a batch size."""
        if self._share and self._binding is not None and self._cache[0].shape()[0] == batch:
            return self._binding
        cache = self._cache if self._past else [self._empty(name, batch) for name in self._pasts]
        binding = self._session.io_binding()
        binding.bind_output("logits", "cpu")  # the first output of the binding, wherever it is bound again
        for name, value in self._given.items():
            binding.bind_ortvalue_input(name, value)
        for name, past, present in zip(self._pasts, cache, self._outputs[1:], strict=True):
            binding.bind_ortvalue_input(name, past)
            if self._share:
                binding.bind_ortvalue_output(present, past)
            else:
                binding.bind_output(present, self._device)
        if self._share:
            self._binding, self._cache, self._step = binding, cache, None
        return binding

    def _empty(self, name: str, batch: int) -> ort.OrtValue:
        if name in self._states:
            return zeros([batch, *self._states[name]], self._cache_type, self._device)
        sizes = self._sizes[name]
        length = self._max_length if self._share and self._max_length is not None else 0
        return zeros([batch, sizes[1], length, sizes[3]], self._cache_type, self._device)


def open_decoder(
    folder: str | Path,
    manifest: Manifest | None = None,
    *,
    threads: int | None = None,
    provider: str | None = None,
    max_length: int = 2048,
    records: bool | None = None,
    adapter: str | None = None,
    embed: Embeds | None = None,
) -> Decoder:
    """Open a folder for generation; max_length bounds a shared cache only.

    Args:
        embed: see `Decoder`.
        records: whether steps become a CUDA graph; None where the file and its provider can.
        adapter: the name of one of the export's adapters, to run with.

    Raises: as `open_session` and `Decoder`; InputError: there is no such adapter.
    """
    manifest = manifest or manifests.load(folder)
    cost = row_cost(manifest)
    if adapter is not None:
        # Not by RunOptions, which a run with bound inputs does not ask.
        factors = read_adapter(adapter_path(Path(folder), adapter, manifest.adapters))
        session = open_session(folder, manifest, threads=threads, provider=provider)
        return Decoder(session, manifest.settings, max_length=max_length, factors=factors, row_cost=cost)
    possible = (
        chosen_provider(provider, manifest) == CUDA
        and manifest.settings.get("past_present_share_buffer")
        and cuda_graph.can_record(manifest)
    )
    if possible and records is not False and embed is None:
        try:
            session = open_session(
                folder, manifest, threads=threads, provider=provider, provider_options=cuda_graph.OPTIONS
            )
            return Decoder(session, manifest.settings, max_length=max_length, records=True, row_cost=cost)
        except RuntimeProblem as error:  # a node of this file runs on the CPU; without a graph it does no harm
            if records:
                raise
            logger.info("%s: its steps run without a CUDA graph: %s", folder, error)
    session = open_session(folder, manifest, threads=threads, provider=provider)
    return Decoder(session, manifest.settings, max_length=max_length, embed=embed, row_cost=cost)
