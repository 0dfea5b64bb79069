"""Without data: text that the model writes, begun by one random token each, or random tokens and nothing else.

Of "random" the tokens are those of the vocabulary that are not special, uniformly.
"""

import torch
from torch import Tensor

from ....errors import InputError
from ...self_text import Generate, write_text
from ..registry import Model, Source, source
from ..samples import Samples, whole
from ..text import start_ids


class _Vocabulary(Source):
    tokenizes = False
    word: str

    @classmethod
    def takes(cls, name: str) -> bool:
        return name == cls.word

    def written(self, model: Model, described: str) -> Samples:
        spec, tokenizer = self.spec, model.tokenizer
        start = [] if tokenizer is None else start_ids(tokenizer)
        vocab = _trained(model)
        ids = write_text(
            model.generate or _at_random(vocab), start, spec.samples, spec.sequence_length, vocab=vocab, seed=spec.seed,
            batch_size=model.together,
        )  # fmt: skip
        return whole(ids, f"{described} (seed {spec.seed})")


@source
class OwnText(_Vocabulary):
    word, form = "self", '"self"'

    def samples(self, model: Model) -> Samples:
        if model.generate is None:
            raise InputError("the model cannot write its own calibration text here", remedy="Give calibration data")
        described = f"{self.spec.samples} texts of {self.spec.sequence_length} tokens written by the model"
        return self.written(model, described)


@source
class RandomTokens(_Vocabulary):
    word, form = "random", '"random"'

    def samples(self, model: Model) -> Samples:
        described = f"{self.spec.samples} sequences of {self.spec.sequence_length} random tokens"
        return self.written(Model(model.tokenizer, model.vocab_size), described)


def _trained(model: Model) -> Tensor:
    """The tokens that a text may hold: an embedding may have more rows than the tokenizer has tokens, never trained."""
    tokenizer = model.tokenizer
    known = model.vocab_size if tokenizer is None else min(model.vocab_size, len(tokenizer))
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    return torch.tensor([token for token in range(known) if token not in special], dtype=torch.int64)


def _at_random(vocab: Tensor) -> Generate:
    def generate(input_ids: Tensor, max_new_tokens: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(len(vocab), (len(input_ids), max_new_tokens), generator=generator)
        return torch.cat([input_ids, vocab[drawn]], dim=1)

    return generate
