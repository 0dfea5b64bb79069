"""A causal language model as a witness."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..formula import formula_tensors
from ..steps import Steps
from ..witness import Absent, Call, Outline, Testimony
from .loading import gguf_file, loaded, quiet, with_tensors
from .running import PROMPT, ROWS, STEPS, random_tokens, run, watched, watching
from .said import said_by, said_by_modules, tensors_by_name

if TYPE_CHECKING:
    from ..source import ModelFolder

SMALL = 2e9  # bytes of float32 weights that are held at once, as transformers itself loads them
_LAYER = re.compile(r"(?P<container>.+)\.(?P<index>\d+)$")


@dataclass(frozen=True)
class DecoderWitness:
    """A causal language model: a prompt and two steps with transformers' cache.

    Attributes:
        loader: an auto class of transformers.
    """

    folder: "ModelFolder"
    loader: type[Any] = AutoModelForCausalLM

    def testify(self, outline: Outline) -> Testimony:
        with quiet():
            file = gguf_file(self.folder)  # which transformers reads itself, whatever its weights are
            if self.folder.adapter is not None or (self.folder.codes is not None and file is None):
                return self._by_formula(outline)
            if outline.float_bytes > SMALL and file is None and self.folder.codes is None:
                with suppress(Absent):
                    return said_by_modules(self.loader, self.folder, lambda model: self._calls(model, outline))
            if outline.fits:
                model = loaded(self.loader, self.folder, source=file)
                return said_by(model, self._calls(model, outline), source=file)
            if self.folder.codes is not None:
                raise Absent("its weights, which are codes, do not fit into memory as float32")
            return self._of_some_layers(outline)

    def _by_formula(self, outline: Outline) -> Testimony:
        """The model with the float weights that codes stand for, and that an adapter makes, by published formulas."""
        codes = self.folder.codes
        if not outline.fits:
            raise Absent("its weights, which are codes or merged, do not fit into memory as float32")
        model = with_tensors(self.loader, self.folder, formula_tensors(self.folder, codes))
        of = " and ".join([*([codes.title] if codes else ()), *(["LoRA"] if self.folder.adapter else ())])
        return said_by(model, self._calls(model, outline), note=f" with weights by the formula of {of}")

    def _of_some_layers(self, outline: Outline) -> Testimony:
        """The model without the layers between the second and the last one; without that too if it needs the others."""
        container, depth = row_of_layers(outline.blocks)
        if depth < 3:
            raise Absent("its float32 weights do not fit into memory, and it is not a plain row of layers")
        for kept in ((0, 1, depth - 1), (0, 1)):
            model = loaded(self.loader, self.folder, container=container, kept=kept)
            tensors = tensors_by_name(model)  # by the layers' own numbers
            try:
                calls = self._calls(model, outline, container, kept)
            except Absent:
                if len(kept) == 2:
                    raise
                continue
            return said_by(model, calls, kept=tuple(f"{container}.{i}" for i in kept), tensors=tensors)
        raise AssertionError

    def _calls(
        self, model: PreTrainedModel, outline: Outline, container: str = "", kept: Sequence[int] = ()
    ) -> list[Call]:
        steps = Steps(model)
        modules = watched(model, outline.blocks)
        if kept:
            shorten(model, container, kept)
        ids = random_tokens(model, (ROWS, PROMPT + STEPS))
        calls, start = [], 0
        for end in range(PROMPT, PROMPT + STEPS + 1):
            feeds = {
                "input_ids": ids[:, start:end],
                "attention_mask": torch.ones(ROWS, end, dtype=torch.int64),
                "position_ids": torch.arange(start, end).expand(ROWS, -1),
            }
            with watching(modules) as states:
                made = run(steps, **feeds)
            calls.append(Call(feeds, {"logits": made.logits}, dict(states)))
            start = end
        return calls


def row_of_layers(blocks: Sequence[str]) -> tuple[str, int]:
    """Path of the list of layers, and how many there are."""
    found = [match for name in blocks if (match := _LAYER.match(name))]
    containers = {match["container"] for match in found}
    return (containers.pop(), len(found)) if len(containers) == 1 else ("", 0)


def shorten(model: PreTrainedModel, container: str, kept: Sequence[int]) -> None:
    """Leave only some layers of a model, in place; they keep their numbers."""
    owner, _, leaf = container.rpartition(".")
    layers, config = model.get_submodule(container), model.config.get_text_config()
    if not isinstance(layers, torch.nn.ModuleList):
        raise Absent("its layers are in no list")
    for value in vars(config).values():
        if isinstance(value, list) and len(value) == len(layers):
            # Models look up the kind of a layer by its place among those that run, and by its own number.
            for place, index in enumerate(kept):
                value[place] = value[index]
    setattr(model.get_submodule(owner), leaf, torch.nn.ModuleList([layers[index] for index in kept]))
    config.num_hidden_layers = len(kept)
