"""Text from an export, with the tokenizer in its folder."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import manifest as manifests
from ..errors import InputError, reading
from .decoder import Decoder, Generation, open_decoder
from .drafts import Drafts, spare_tokens
from .patience import at_most
from .sampling import Sampling
from .seq2seq import is_seq2seq, longest_text, open_seq2seq, texts_as_source
from .speech import Speech
from .vision_language import (
    is_vision_language,
    open_processor,
    open_vision_language,
    pictures_as_source,
    prompt_of,
)

logger = logging.getLogger(__name__)

__all__ = ["Decoder", "Drafts", "Generation", "Sampling", "eos_token_ids", "generate_text", "open_decoder"]

Turn = Mapping[str, str]
"""Who says what: role is "system", "user" or "assistant"."""

_MOST_CHARACTERS = 1 << 23  # of a prompt: what some templates write would fill the memory
_PATIENCE = 10.0  # seconds for a chat template: its loops may be longer than anybody lives
_DAMAGED = "Copy the model's tokenizer files into it again"


def generate_text(
    folder: str | Path,
    prompt: str | Sequence[str] | None = None,
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    start: Sequence[int] | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    chat: bool = False,
    system: str | None = None,
    threads: int | None = None,
    provider: str | None = None,
    on_text: Callable[[int, str], None] | None = None,
    adapter: str | None = None,
    drafts: Drafts | None = None,
    images: Sequence[Any] = (),
    beams: int | None = None,
    speech: Speech | None = None,
) -> list[str]:
    """Continue text with an exported folder and the tokenizer in it; an encoder-decoder writes about it.

    Args:
        folder: exported folder.
        prompt: one prompt or a batch.
        inputs: what an encoder-decoder of sound or pictures reads instead, by name: {"input_features": [batch, bins,
            frames]}, as its feature extractor makes them.
        start: token ids that the texts of an encoder-decoder begin with, in the place of those that its configs name.
        max_new_tokens: new tokens a prompt gets at most; fewer where the model's context ends before, and a warning
            says so.
        sampling: how to draw; None takes the likeliest token.
        chat: put the prompt as a user's turn into the tokenizer's chat template.
        system: with chat, what the system says before.
        threads: threads within an operator.
        provider: run on this provider instead of the one the file was made for.
        on_text: called as on_text(row, piece) while text grows; the pieces of a row add up to its text.
        adapter: the name of an adapter that the export keeps apart, to run with.
        drafts: guess the next tokens of one prompt and read them together, which is faster where a text repeats itself
            or its prompt.
        images: of a model of pictures and text, what its one prompt is about: paths of pictures, pictures of Pillow or
            arrays uint8 [height, width, 3]. Those that no token of the prompt stands for come first. Of an
            encoder-decoder that reads pictures, what it writes about, a text for each, without a prompt.
        beams: of an encoder-decoder, texts that are followed at once, of which the likeliest is written; None: as many
            as its generation config says, whose other rules hold too.
        speech: of a model of speech, in which language, for which task, and whether with times.

    Returns:
        the new text of each prompt, without special tokens.

    Raises:
        InputError: the folder is no export or has no usable tokenizer, there is no chat template or it refuses the
            turns, a system without chat, or a prompt that the model's context has no room for; neither a prompt nor
            inputs, or something that this kind of model does not read; drafts where `Decoder.generate` takes none.
        RuntimeProblem: as `open_session`.
    """
    folder = Path(folder)
    sees = is_vision_language(folder)
    if images and prompt is None and inputs is None and is_seq2seq(folder):
        inputs, images = pictures_as_source(folder, images), ()
    manifest = None if is_seq2seq(folder) else manifests.load(folder / manifests.DECODER if sees else folder)
    _check_read(prompt, inputs, {"start": start, "beams": beams, "speech": speech}, manifest)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    _check_pictures(images, sees, len(prompts), adapter)
    tokenizer = open_tokenizer(folder)
    if system is not None and not chat:
        raise InputError("a system message is part of a chat", place="system", remedy="Pass --chat too")
    processor = open_processor(folder) if images or (chat and sees) else None
    if chat and processor is not None:
        prompts = [templated(processor, about_pictures(text, len(images), system), folder) for text in prompts]
    elif chat:
        prompts = [templated(tokenizer, first_turns(text, system), folder) for text in prompts]
    pictures: dict[str, np.ndarray] = {}
    if images:
        tokens, pictures = prompt_of(processor, prompts[0], images, folder, special=not chat)
        ids = [tokens]
    else:
        ids = token_ids(tokenizer, prompts, folder, special=not chat)  # a template writes its own special tokens
    count = len(ids) if inputs is None else max(map(len, inputs.values()), default=0)
    limit, rows = limits(folder, manifest)
    spare = spare_tokens(drafts)
    room = _room(ids, None if limit is None else limit - spare, rows, apart=manifest is None)
    new_tokens = max_new_tokens if room is None else min(max_new_tokens, room)
    streams = [TextStream(tokenizer, folder) for _ in range(count)]

    def on_token(row: int, token: int) -> None:
        piece = streams[row].push(token)
        if piece and on_text:
            on_text(row, piece)

    timed = speech is not None and speech.timestamps
    listener = on_token if on_text and not timed else None
    if manifest is None:
        if adapter is not None:
            raise InputError("an encoder-decoder cannot keep adapters apart", place="adapter", remedy="Leave it out")
        if drafts is not None:
            raise InputError("an encoder-decoder does not take drafts", place="draft", remedy="Leave it out")
        pair = open_seq2seq(folder, threads=threads, provider=provider)
        source = texts_as_source(pair, ids) if inputs is None else inputs
        begin = None if start is None else [start] * count
        result = pair.write(
            source, max_new_tokens=new_tokens, prompts=begin, sampling=sampling, on_token=listener, beams=beams,
            speech=speech,
        )  # fmt: skip
        known = pair.habits.speech
    else:
        longest = max((len(row) for row in ids), default=0) + new_tokens + spare
        never: tuple[int, ...] = ()
        if sees:
            reader, decoder = open_vision_language(folder, threads=threads, provider=provider, max_length=longest)
            never = (reader.token,)
            if pictures:
                reader.read(pictures)
        else:
            decoder = open_decoder(
                folder, manifest, threads=threads, provider=provider, max_length=longest, adapter=adapter
            )  # fmt: skip
        result = decoder.generate(
            ids,
            max_new_tokens=new_tokens,
            eos_token_ids=eos_token_ids(folder, tokenizer.eos_token_id),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            sampling=sampling,
            on_token=listener,
            drafts=drafts,
            never=never,
        )
        known = None
    if listener and on_text:
        for row, stream in enumerate(streams):
            if rest := stream.finish():
                on_text(row, rest)
    written = max(map(len, result.tokens))
    if written < max_new_tokens and not all(result.finished):
        logger.warning("stopped after %d new tokens, where the model's context of %s tokens ends", written, limit)

    def text_of(tokens: Sequence[int]) -> str:
        return decoded(tokenizer, tokens, folder)

    texts = [known.timed(row, text_of) if timed and known else text_of(row) for row in result.tokens]
    if timed and on_text:  # times are known when a text is whole
        for row, text in enumerate(texts):
            on_text(row, text)
    return texts


def eos_token_ids(folder: str | Path, default: int | None = None) -> tuple[int, ...]:
    """End-of-sequence tokens from generation_config.json, else config.json, else `default`."""
    value = manifests.stated(folder).get("eos_token_id", () if default is None else default)
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_read(
    prompt: object, inputs: object, alone: Mapping[str, object], manifest: manifests.Manifest | None
) -> None:
    """Refuse what this kind of model does not read; alone: what encoder-decoders alone take."""
    if (prompt is None) == (inputs is None):
        raise InputError("there is nothing to continue, or too much", place="prompt, inputs", remedy="Give one")
    for name, given in (("inputs", inputs), *alone.items()):
        if given is not None and manifest is not None:
            raise InputError("only an encoder-decoder takes it", place=name, remedy="Pass a prompt")


def _check_pictures(images: Sequence[Any], sees: bool, prompts: int, adapter: str | None) -> None:
    """Refuse pictures that nothing reads, or that nobody knows the prompt of; and adapters beside pictures."""
    if sees and adapter is not None:
        raise InputError("a model of pictures cannot keep adapters apart", place="adapter", remedy="Leave it out")
    if images and not sees:
        raise InputError("this export does not read pictures", place="images", remedy="Leave them out")
    if images and prompts != 1:
        raise InputError(f"pictures belong to one prompt, but there are {prompts}", place="images")


def about_pictures(text: str, pictures: int, system: str | None) -> list[dict[str, Any]]:
    """The same as `first_turns`, of pictures and a text about them, in parts as processors have it."""
    parts = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": text}]
    first = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    return [*first, {"role": "user", "content": parts}]


def first_turns(text: str, system: str | None) -> list[Turn]:
    """What a user says first, behind what the system says, if it says anything."""
    return [*([] if system is None else [{"role": "system", "content": system}]), {"role": "user", "content": text}]


def templated(tokenizer, turns: Sequence[Turn] | Sequence[dict[str, Any]], folder: Path) -> str:
    """The turns of a conversation in the chat template of a model, up to where it answers.

    Raises:
        InputError: it has none, or refuses these turns.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template", place=str(folder), remedy="Leave out --chat")
    has_system = turns[0]["role"] == "system"
    remedy = "It may take no system message" if has_system else "It may want a system message: pass --system"
    with reading(folder, "its chat template refuses these messages", remedy), at_most(_PATIENCE):
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)


def token_ids(tokenizer, texts: Sequence[str], folder: Path, *, special: bool) -> list[list[int]]:
    """Token ids of each text; of an empty one what begins texts, where something does."""
    if (longest := max(map(len, texts), default=0)) > _MOST_CHARACTERS:
        raise InputError(f"has {longest:,} characters, more than any model reads", place="prompt", remedy="Shorten it")
    with reading(folder, "its tokenizer cannot read the prompt", _DAMAGED):
        ids = [list(tokenizer(text, add_special_tokens=special)["input_ids"]) for text in texts]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [row or start for row in ids]


def limits(folder: Path, manifest: manifests.Manifest | None) -> tuple[int | None, int | None]:
    """The most tokens that the model reads, and how many it knows; None where nothing says so."""
    said = manifests.stated(folder) if manifest is None else manifest.settings
    rows = said.get("vocab_size")
    return longest_text(said), rows if isinstance(rows, int) and rows > 0 else None


def _room(ids: Sequence[Sequence[int]], limit: int | None, rows: int | None, *, apart: bool) -> int | None:
    """How many tokens there may be after the longest prompt, None where there is no end.

    Args:
        apart: an encoder reads the prompts, and what is written has a context of its own.

    Raises:
        InputError: none, or a token that the model does not know.
    """
    unknown = next((token for row in ids for token in row if rows is not None and token >= rows), None)
    if unknown is not None:
        raise InputError(
            f"the tokenizer gives token {unknown}, but the model knows {rows} tokens", place="prompt",
            remedy="Use the tokenizer that belongs to the model",
        )  # fmt: skip
    longest = max((len(row) for row in ids), default=0)
    if limit is None:
        return None
    if longest > limit - (not apart):
        raise InputError(
            f"its {longest} tokens leave no room: the model reads at most {limit}", place="prompt",
            remedy=f"Shorten it to {limit - (not apart)} tokens or fewer",
        )  # fmt: skip
    return limit - (1 if apart else longest)


def decoded(tokenizer, tokens: Sequence[int], folder: Path) -> str:
    """The text of tokens, without special ones."""
    with reading(folder, "its tokenizer cannot decode what the model wrote", _DAMAGED):
        return tokenizer.decode(tokens, skip_special_tokens=True)


class TextStream:
    """Text of a growing list of tokens, handed out once no later token can change it."""

    def __init__(self, tokenizer, folder: Path):
        self._tokenizer, self._folder, self._given = tokenizer, folder, ""
        self._tokens: list[int] = []

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._text()
        # A character of several bytes comes in several tokens and decodes to the replacement character until whole.
        if text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(self._given):
            return ""
        return self._hand_out(text)

    def finish(self) -> str:
        return self._hand_out(self._text())

    def _text(self) -> str:
        return decoded(self._tokenizer, self._tokens, self._folder)

    def _hand_out(self, text: str) -> str:
        piece, self._given = text[len(self._given) :], text
        return piece


def open_tokenizer(folder: Path):
    """The tokenizer in an exported folder."""
    from transformers import AutoTokenizer

    with reading(folder, "no usable tokenizer", _DAMAGED):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
