"""Beams and the other rules of a generation config, by transformers' own search over the sessions of an export.

It takes torch, so whoever runs exports imports it where a config or a user asks for such things, and nowhere else.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.logits_process import LogitsProcessor, WhisperTimeStampLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from ..errors import reading
from .decoder import Decoder
from .writing import Generation


class _Rows:
    """A decoder's cache, as far as a search touches it."""

    is_compileable = False

    def __init__(self, decoder: Decoder):
        self._decoder = decoder

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._decoder.past

    def reorder_cache(self, rows: Tensor) -> None:
        """Let every beam go on from another."""
        self._decoder.pick(rows.tolist())


class _Searched(GenerationMixin):
    """A decoder that has read its source, as transformers' search takes models."""

    main_input_name, base_model_prefix = "input_ids", ""
    input_modalities = ("text",)
    _is_stateful = False
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, decoder: Decoder, config: Any, rules: GenerationConfig):
        self._decoder, self.config, self.generation_config = decoder, config, rules
        self.prefill_seconds, self.calls = 0.0, 0

    def __call__(self, **inputs: Any) -> Seq2SeqLMOutput:
        return self.forward(**inputs)

    def forward(
        self, decoder_input_ids: Tensor, past_key_values: _Rows, encoder_outputs: Any = None, return_dict: bool = True
    ) -> Seq2SeqLMOutput:
        """Logits [rows, tokens, vocabulary] behind tokens that the cache does not hold yet."""
        started = perf_counter()
        logits = np.array(self._decoder.run(decoder_input_ids.numpy()), np.float32)
        if not self.calls:
            self.prefill_seconds = perf_counter() - started
        self.calls += 1
        return Seq2SeqLMOutput(logits=torch.from_numpy(logits), past_key_values=past_key_values)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, next_sequence_length: int | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        new = input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
        return {"decoder_input_ids": new, "past_key_values": past_key_values}

    @contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        yield  # it is for mixtures of experts in PyTorch


def search(
    decoder: Decoder,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    source: np.ndarray | None,
    beams: int,
    max_new_tokens: int,
    timestamps: bool,
) -> Generation:
    """Write about a source with every rule of the model's generation config.

    Args:
        decoder: has read the source, every row of it `beams` times.
        folder: of the export, with the configs.
        prompts: token ids that the texts begin with, one list a row, all of one length.
        source: token ids that the encoder read, int64 [rows, source], for rules about them; None of other sources.
        beams: texts that are followed at once for each row; the likeliest is what is written.
        max_new_tokens: new tokens a row gets at most.
        timestamps: by Whisper's rules for them.

    Raises:
        InputError: the configs cannot be read, or ask for what this search does not have.
    """
    wrong = "its generation config cannot be followed"
    with reading(folder, wrong):
        config, rules = AutoConfig.from_pretrained(folder, local_files_only=True), _rules(folder)
        # Prompts begin as they are given: a start token that differs would be put in front of them.
        rules.update(decoder_start_token_id=prompts[0][0], max_length=None, num_return_sequences=1, do_sample=False)
    length = len(prompts[0])
    model: Any = _Searched(decoder, config, rules)  # and no PreTrainedModel, which the mixin is declared for
    extra: list[LogitsProcessor] = [WhisperTimeStampLogitsProcessor(rules, begin_index=length)] if timestamps else []
    started = perf_counter()
    # What warns are combinations that the model's authors chose; what is refused are others.
    with warnings.catch_warnings(action="ignore"), reading(folder, wrong):
        found: Any = model.generate(
            None if source is None else torch.from_numpy(np.ascontiguousarray(source)),
            encoder_outputs=BaseModelOutput(last_hidden_state=torch.zeros(len(prompts), 1, 1)),
            decoder_input_ids=torch.tensor(prompts), past_key_values=_Rows(decoder), num_beams=beams,
            max_new_tokens=max_new_tokens, logits_processor=LogitsProcessorList(extra),
        )  # fmt: skip
    seconds = perf_counter() - started
    ends = rules.eos_token_id if isinstance(rules.eos_token_id, list) else [rules.eos_token_id]
    texts = [_until(row[length:].tolist(), ends) for row in found]
    return Generation(
        tuple(map(tuple, texts)), tuple(bool(text) and text[-1] in ends for text in texts), model.prefill_seconds,
        seconds - model.prefill_seconds, model.calls - 1,
    )  # fmt: skip


def _rules(folder: Path) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def _until(tokens: list[int], ends: Sequence[int | None]) -> list[int]:
    """A text up to the token that ends it, which stays."""
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]

