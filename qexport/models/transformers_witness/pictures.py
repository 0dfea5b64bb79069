"""A part of a model of pictures and text as a witness."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..vision_language.prompts import Prompt, random_prompt
from ..witness import Absent, Call, Outline, Testimony, first_line
from .loading import loaded, quiet
from .running import PROMPT, ROWS, STEPS, random_tokens, run
from .said import said_by

if TYPE_CHECKING:
    from ..source import ModelFolder
    from ..vision_language import VisionLanguage


@dataclass(frozen=True)
class PicturesWitness:
    """A part of a model of pictures and text, which transformers runs as one model on a prompt with pictures.

    Attributes:
        kind: its architecture.
        captured: as in `EncoderWitness`.
        part: "vision", "embedding" or "decoder", by the names that its inputs and outputs have in `outline`.
    """

    folder: "ModelFolder"
    kind: "VisionLanguage"
    captured: PreTrainedModel | None
    part: str = ""

    def __deepcopy__(self, memo):
        return self

    def testify(self, outline: Outline) -> Testimony:
        with quiet():
            stored = sum(file.stat().st_size for file in self.folder.path.glob("*.safetensors"))
            fits = 2 * stored <= outline.memory and outline.fits  # of weights that may be kept in 16 bits
            model = loaded(self.kind.loader, self.folder) if fits else self.captured
            if model is None:
                raise Absent("its float32 weights do not fit into memory")
            with torch.no_grad():
                calls = getattr(self, f"_{self.part}")(model, self._prompt(model))
            return said_by(model, calls, again=model is self.captured)

    def _prompt(self, model: PreTrainedModel) -> Prompt:
        return random_prompt(self.kind, model, ROWS, PROMPT)

    def _vision(self, model: PreTrainedModel, prompt: Prompt) -> list[Call]:
        made = self._try(lambda: self.kind.stated(model, prompt.pictures))
        return [Call(prompt.pictures, {"image_features": made})]

    def _embedding(self, model: PreTrainedModel, prompt: Prompt) -> list[Call]:
        features = self._try(lambda: self.kind.stated(model, prompt.pictures))
        feeds, _ = self._step(model, DynamicCache(config=model.config), prompt.input_ids, prompt.pictures, 0)
        given = {"input_ids": prompt.input_ids, "image_features": features}
        config = model.config
        told = self.kind.told(config, self.kind.written(config, prompt.input_ids))
        made = ("inputs_embeds", *(name for name in self.kind.others(config) if name not in told))
        return [Call(given, {name: feeds[name] for name in made})]

    def _decoder(self, model: PreTrainedModel, prompt: Prompt) -> list[Call]:
        cache, calls, past = DynamicCache(config=model.config), [], 0
        more = random_tokens(model, (ROWS, STEPS))
        for ids in (prompt.input_ids, *more.split(1, dim=1)):
            feeds, logits = self._step(model, cache, ids, prompt.pictures if not past else {}, past)
            calls.append(Call(feeds, {"logits": logits}))
            past += ids.shape[1]
        return calls

    def _step(
        self, model: PreTrainedModel, cache: Cache, ids: Tensor, pictures: Mapping[str, Tensor], past: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What the decoder of the whole model reads of some tokens, and the logits behind each."""
        rows, new = ids.shape
        mask = torch.ones(rows, past + new, dtype=torch.int64)
        seen: dict[str, Any] = {}

        def note(module, args, kwargs) -> None:
            seen.update(kwargs)

        handle = model.get_submodule(self.kind.decoder).register_forward_pre_hook(note, with_kwargs=True)
        try:
            made = run(
                # Behind a prompt with pictures some count positions by all of a mask, and not by the new tokens.
                model, input_ids=ids, attention_mask=None if past else mask, past_key_values=cache, use_cache=True,
                **self.kind.given(pictures, rows), **self.kind.beside(model.config, ids),
            )  # fmt: skip
        finally:
            handle.remove()
        positions = seen.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + new).expand(rows, -1)
        read = {"inputs_embeds": seen["inputs_embeds"], "attention_mask": mask, "position_ids": positions}
        return read | self.kind.seen_besides(model.config, ids, seen), made.logits

    @staticmethod
    def _try(make: Callable[[], Tensor]) -> Tensor:
        try:
            return make()
        except Exception as error:  # of transformers' code, as in `run`
            raise Absent(f"transformers cannot run it ({first_line(error)})") from error
