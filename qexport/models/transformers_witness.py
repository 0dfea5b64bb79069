"""Transformers' own model as a witness: loaded by transformers from the user's folder or GGUF file, attention eager."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from ..artifact.manifest import STATES
from .formula import formula_tensors
from .layerwise import StoredWeights, open_layerwise
from .steps import Steps
from .tokens import embedding_rows
from .vision_language.prompts import Prompt, random_prompt
from .witness import Absent, Call, Outline, Testimony, first_line, leaves

if TYPE_CHECKING:
    from .source import ModelFolder
    from .vision_language import VisionLanguage

ROWS, PROMPT, STEPS = 2, 16, 2
_SMALL = 2e9  # bytes of float32 weights that are held at once, as transformers itself loads them
_BY_MODULES = ", a module at a time"
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
        with _quiet():
            file = _gguf(self.folder)  # which transformers reads itself, whatever its weights are
            if self.folder.adapter is not None or (self.folder.codes is not None and file is None):
                return self._by_formula(outline)
            if outline.float_bytes > _SMALL and file is None and self.folder.codes is None:
                with suppress(Absent):
                    return self._by_modules(outline)
            if outline.fits:
                model = _loaded(self.loader, self.folder, source=file)
                return _said(model, self._calls(model, outline), source=file)
            if self.folder.codes is not None:
                raise Absent("its weights, which are codes, do not fit into memory as float32")
            return self._of_some_layers(outline)

    def _by_modules(self, outline: Outline) -> Testimony:
        """The whole model, the weights of one module at a time."""
        model, weights = _a_module_at_a_time(self.loader, self.folder)
        said = _said(model, self._calls(model, outline), note=_BY_MODULES)
        return replace(said, weight=weights.read)

    def _by_formula(self, outline: Outline) -> Testimony:
        """The model with the float weights that codes stand for, and that an adapter makes, by published formulas."""
        codes = self.folder.codes
        if not outline.fits:
            raise Absent("its weights, which are codes or merged, do not fit into memory as float32")
        model = _with_tensors(self.loader, self.folder, formula_tensors(self.folder, codes))
        of = " and ".join([*([codes.title] if codes else ()), *(["LoRA"] if self.folder.adapter else ())])
        return _said(model, self._calls(model, outline), note=f" with weights by the formula of {of}")

    def _of_some_layers(self, outline: Outline) -> Testimony:
        """The model without the layers between the second and the last one; without that too if it needs the others."""
        container, depth = _row(outline.blocks)
        if depth < 3:
            raise Absent("its float32 weights do not fit into memory, and it is no row of layers")
        for kept in ((0, 1, depth - 1), (0, 1)):
            model = _loaded(self.loader, self.folder, container=container, kept=kept)
            tensors = _tensors(model)  # by the layers' own numbers
            try:
                calls = self._calls(model, outline, container, kept)
            except Absent:
                if len(kept) == 2:
                    raise
                continue
            return _said(model, calls, kept=tuple(f"{container}.{i}" for i in kept), tensors=tensors)
        raise AssertionError

    def _calls(
        self, model: PreTrainedModel, outline: Outline, container: str = "", kept: Sequence[int] = ()
    ) -> list[Call]:
        steps = Steps(model)
        watched = _watched(model, outline.blocks)
        if kept:
            _shorten(model, container, kept)
        ids = random_tokens(model, (ROWS, PROMPT + STEPS))
        calls, start = [], 0
        for end in range(PROMPT, PROMPT + STEPS + 1):
            feeds = {
                "input_ids": ids[:, start:end],
                "attention_mask": torch.ones(ROWS, end, dtype=torch.int64),
                "position_ids": torch.arange(start, end).expand(ROWS, -1),
            }
            with _watching(watched) as states:
                made = _run(steps, **feeds)
            calls.append(Call(feeds, {"logits": made.logits}, dict(states)))
            start = end
        return calls


@dataclass(frozen=True)
class EncoderWitness:
    """A model that reads its input whole, with the head that its config names.

    Attributes:
        loader: an auto class of transformers.
        captured: the model that the graph was made from, which runs again where a second one does not fit into memory;
            None where that has no weights.
        absent: weights that no checkpoint has; what depends on them is no output of the graph.
        inputs: of every call.
    """

    folder: "ModelFolder"
    loader: type[Any]
    captured: PreTrainedModel | None
    absent: frozenset[str]
    inputs: Sequence[Mapping[str, Tensor]]

    @property
    def module(self) -> PreTrainedModel | None:
        """See `module_of`."""
        return self.captured

    def __deepcopy__(self, memo):
        return self

    def testify(self, outline: Outline) -> Testimony:
        with _quiet():
            if self.captured is None:
                with suppress(Absent):
                    bare, weights = _a_module_at_a_time(self.loader, self.folder, self.absent)
                    said = _said(bare, self._calls(bare, outline), note=_BY_MODULES)
                    return replace(said, weight=weights.read)
            model = _loaded(self.loader, self.folder, self.absent) if outline.fits else self.captured
            if model is None:
                raise Absent("its float32 weights do not fit into memory")
            return _said(model, self._calls(model, outline), again=model is self.captured)

    def _calls(self, model: PreTrainedModel, outline: Outline) -> list[Call]:
        watched, calls = _watched(model, outline.blocks), []
        for feeds in self.inputs:
            with _watching(watched) as states:
                made = _run(model, **feeds)
            calls.append(Call(feeds, {n: t for n, t in leaves(made) if n in outline.outputs}, dict(states)))
        return calls


@dataclass(frozen=True)
class PartWitness:
    """The encoder or the decoder of an encoder-decoder, which transformers runs as one model.

    Attributes:
        loader: an auto class of transformers.
        captured: as in `EncoderWitness`.
        source: an input of the encoder, whose shapes are taken.
        decodes: whether it is the decoder.
    """

    folder: "ModelFolder"
    loader: type[Any]
    captured: PreTrainedModel | None
    source: Mapping[str, Tensor]
    decodes: bool

    def __deepcopy__(self, memo):
        return self

    def testify(self, outline: Outline) -> Testimony:
        run = self._decoded if self.decodes else self._encoded
        with _quiet():
            if self.captured is None:
                with suppress(Absent):
                    bare, weights = _a_module_at_a_time(self.loader, self.folder)
                    return replace(_said(bare, run(bare), note=_BY_MODULES), weight=weights.read)
            model = _loaded(self.loader, self.folder) if outline.fits else self.captured
            if model is None:
                raise Absent("its float32 weights do not fit into memory")
            return _said(model, run(model), again=model is self.captured)

    def _sources(self, model: PreTrainedModel) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(1)
        return {
            name: torch.randn(like.shape, generator=random) if like.is_floating_point()
            else torch.ones_like(like) if name == "attention_mask" else random_tokens(model, like.shape)
            for name, like in self.source.items()
        }  # fmt: skip

    def _read(self, model: PreTrainedModel, source: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """What the encoder makes, and the keys and values that the decoder's layers make of it."""
        states, cache = _run(model.get_encoder(), **source), _caches()
        first = random_tokens(model, (len(next(iter(source.values()))), 1))
        mask = {name: mask for name, mask in source.items() if name == "attention_mask"}
        _run(model, encoder_outputs=states, decoder_input_ids=first, past_key_values=cache, use_cache=True, **mask)
        return states, {
            f"cross_key_values.{i}.{part}": tensor
            for i, (keys, values) in enumerate(_kept(cache.cross_attention_cache))
            for part, tensor in (("key", keys), ("value", values))
        }

    def _encoded(self, model: PreTrainedModel) -> list[Call]:
        source = self._sources(model)
        states, cross = self._read(model, source)
        return [Call(source, cross | {STATES: states.last_hidden_state})]

    def _decoded(self, model: PreTrainedModel) -> list[Call]:
        source = self._sources(model)
        states, cross = self._read(model, source)
        cache, calls, start = _caches(), [], 0
        mask = {name: mask for name, mask in source.items() if name == "attention_mask"}
        length = PROMPT // 4  # of what is decoded: some models write a few tokens only
        ids = random_tokens(model, (len(next(iter(source.values()))), length + STEPS))
        for end in range(length, length + STEPS + 1):
            made = _run(
                model, encoder_outputs=states, decoder_input_ids=ids[:, start:end], past_key_values=cache,
                use_cache=True, **mask,
            )  # fmt: skip
            masked = {f"encoder_{name}": tensor for name, tensor in mask.items()}
            feeds = {"input_ids": ids[:, start:end], **masked, **cross}
            calls.append(Call(feeds, {"logits": made.logits}))
            start = end
        return calls


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
        with _quiet():
            stored = sum(file.stat().st_size for file in self.folder.path.glob("*.safetensors"))
            fits = 2 * stored <= outline.memory and outline.fits  # of weights that may be kept in 16 bits
            model = _loaded(self.kind.loader, self.folder) if fits else self.captured
            if model is None:
                raise Absent("its float32 weights do not fit into memory")
            with torch.no_grad():
                calls = getattr(self, f"_{self.part}")(model, self._prompt(model))
            return _said(model, calls, again=model is self.captured)

    def _prompt(self, model: PreTrainedModel) -> Prompt:
        return random_prompt(self.kind, model, ROWS, PROMPT)

    def _vision(self, model: PreTrainedModel, prompt: Prompt) -> list[Call]:
        made = self._try(lambda: self.kind.stated(model, prompt.pictures))
        return [Call(prompt.pictures, {"image_features": made})]

    def _embedding(self, model: PreTrainedModel, prompt: Prompt) -> list[Call]:
        features = self._try(lambda: self.kind.stated(model, prompt.pictures))
        feeds, _ = self._step(model, DynamicCache(config=model.config), prompt.input_ids, prompt.pictures, 0)
        given = {"input_ids": prompt.input_ids, "image_features": features}
        made = ("inputs_embeds", *self.kind.others(model.config))
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
            made = _run(
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
        except Exception as error:  # of transformers' code, as in `_run`
            raise Absent(f"transformers cannot run it ({first_line(error)})") from error


def _gguf(folder: "ModelFolder") -> Path | None:
    """The GGUF file that the folder was made from, if it was."""
    named = Path(folder.name)
    if named.is_file():
        return named
    own = sorted(named.glob("*.gguf")) if named.is_dir() and named.resolve() != folder.path.resolve() else []
    return own[0] if len(own) == 1 else None


def _a_module_at_a_time(
    loader: type[Any], folder: "ModelFolder", absent: frozenset[str] = frozenset()
) -> tuple[PreTrainedModel, StoredWeights]:
    """See `open_layerwise`; raises Absent where transformers cannot build the model."""
    try:
        return open_layerwise(loader, folder, absent)
    except Exception as error:  # as in `_loaded`
        raise Absent(f"transformers cannot load it ({first_line(error)})") from error


def _loaded(
    loader: type[Any], folder: "ModelFolder", absent: frozenset[str] = frozenset(), *, source: Path | None = None,
    container: str = "", kept: Sequence[int] = (),
) -> PreTrainedModel:  # fmt: skip
    """Transformers' model in float32.

    Args:
        absent: weights that may be missing; source: a GGUF file to read instead of the folder.
        container, kept: path of a list of layers, and those of them that are loaded; empty: all.

    Raises:
        Absent: transformers cannot load it, or makes up weights.
    """
    place, options = folder.path, dict[str, Any](use_safetensors=True)
    if source is not None:
        place, options = source.parent, {"gguf_file": source.name}
    try:
        if kept:
            with torch.device("meta"):
                config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=folder.trust_remote_code)
                whole = loader.from_config(config, trust_remote_code=folder.trust_remote_code)
            loader = _without_others(type(whole), container, kept)
        model, info = loader.from_pretrained(
            place, dtype=torch.float32, attn_implementation="eager", trust_remote_code=folder.trust_remote_code,
            output_loading_info=True, **options,
        )  # fmt: skip
    except Exception as error:  # transformers raises what its libraries raise, and remote code anything
        why = first_line(error).replace(str(place), "its folder")
        raise Absent(f"transformers cannot load it ({why})") from error
    missing = sorted(set(info["missing_keys"]) - absent)
    if missing:
        raise Absent(f"transformers finds {len(missing)} of its weights nowhere, first {missing[0]}")
    return model.eval()


def _with_tensors(loader: type[Any], folder: "ModelFolder", tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """Transformers' model in float32 with these parameters and stored buffers.

    Raises:
        Absent: transformers cannot build it, or some are missing or of other shapes.
    """
    config = copy.deepcopy(folder.config)
    for part in (config, config.get_text_config()):
        if getattr(part, "_experts_implementation", None):  # which the capture sets in the config that it is given
            part._experts_implementation = "eager"
    try:
        with init_empty_weights(include_buffers=False):
            model = loader.from_config(
                config, dtype=torch.float32, attn_implementation="eager",
                trust_remote_code=folder.trust_remote_code,
            )  # fmt: skip
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
    except Exception as error:  # as in `_loaded`
        raise Absent(f"transformers cannot load it ({first_line(error)})") from error
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise Absent(f"{len(missing)} of its weights are nowhere, first {missing[0]}")
    return model.eval()


def _without_others(model: type[Any], container: str, kept: Sequence[int]) -> type[Any]:
    """A model class whose other layers are empty, so that nothing is loaded for them."""

    def __init__(self, config, *args, **options):
        model.__init__(self, config, *args, **options)
        layers = self.get_submodule(container)
        for index in range(len(layers)):
            if index not in kept:
                layers[index] = torch.nn.Module()

    return type(model.__name__, (model,), {"__init__": __init__, "__module__": model.__module__})


def _shorten(model: PreTrainedModel, container: str, kept: Sequence[int]) -> None:
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


def _row(blocks: Sequence[str]) -> tuple[str, int]:
    """Path of the list of layers, and how many there are."""
    found = [match for name in blocks if (match := _LAYER.match(name))]
    containers = {match["container"] for match in found}
    return (containers.pop(), len(found)) if len(containers) == 1 else ("", 0)


def _watched(model: PreTrainedModel, blocks: Sequence[str]) -> dict[str, torch.nn.Module]:
    modules = dict(model.named_modules())
    return {name: modules[name] for name in blocks if name in modules}


@contextmanager
def _watching(modules: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What modules make while the `with` runs, by name; of several values the first."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable:
        def hook(module, inputs, result):
            seen[name] = result if isinstance(result, Tensor) else result[0]

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def random_tokens(model: PreTrainedModel, shape: Sequence[int]) -> Tensor:
    """Token ids, the same at every call."""
    vocabulary = embedding_rows(model)
    return torch.randint(0, vocabulary, tuple(shape), generator=torch.Generator().manual_seed(0))


def _kept(cache: Cache) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of every layer."""
    layer: Any
    for layer in cache.layers:
        yield layer.keys, layer.values


def _caches() -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _run(model: Callable, **feeds):
    try:
        with torch.no_grad():
            return model(**feeds)
    except Exception as error:  # as above
        raise Absent(f"transformers cannot run it ({first_line(error)})") from error


def _said(
    model: PreTrainedModel, calls: Sequence[Call], *, kept: tuple[str, ...] | None = None, again: bool = False,
    source: Path | None = None, tensors: Mapping[str, Tensor] | None = None, note: str = "",
) -> Testimony:  # fmt: skip
    if again:
        note = " on the weights that were captured, for want of memory"
    elif source:
        note = " of the GGUF file"
    name = f"transformers {transformers.__version__}, {type(model).__name__}{note}"
    held = tensors or _tensors(model)

    def weight(name: str, row: int | None = None) -> Tensor | None:
        found = held.get(name)
        return found if found is None or row is None else found[row]

    return Testimony(name, calls, kept, weight)


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    tensors = dict(model.named_buffers(remove_duplicate=False))
    return tensors | {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines and bars of transformers: what is missing or too much is the caller's to say."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
