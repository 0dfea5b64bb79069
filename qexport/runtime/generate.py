"""Text from an exported decoder, with the tokenizer in its folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import InputError
from . import manifest as manifests
from .decoder import Decoder, Generation, open_decoder
from .sampling import Sampling
from .seq2seq import is_seq2seq, open_seq2seq, texts_as_source

__all__ = ["Decoder", "Generation", "Sampling", "eos_token_ids", "generate_text", "open_decoder"]


def generate_text(
    folder: str | Path,
    prompt: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    chat: bool = False,
    threads: int | None = None,
    provider: str | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Continue text with an exported folder and the tokenizer in it; an encoder-decoder writes about it.

    Args:
        folder: exported folder.
        prompt: one prompt or a batch.
        max_new_tokens: new tokens a prompt gets at most.
        sampling: how to draw; None takes the likeliest token.
        chat: put the prompt as a user's turn into the tokenizer's chat template.
        threads: threads within an operator.
        provider: run on this provider instead of the one the file was made for.
        on_text: called as on_text(row, piece) while text grows; the pieces of a row add up to its text.

    Returns:
        the new text of each prompt, without special tokens.

    Raises:
        InputError: the folder is no export or has no tokenizer, or chat without a chat template.
        RuntimeProblem: as `open_session`.
    """
    folder = Path(folder)
    manifest = None if is_seq2seq(folder) else manifests.load(folder)
    tokenizer = _tokenizer(folder)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if chat:
        if not tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template", place=str(folder), remedy="Leave out --chat")
        turns = [[{"role": "user", "content": text}] for text in prompts]
        prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    # A template writes its own special tokens.
    ids = [tokenizer(text, add_special_tokens=not chat)["input_ids"] for text in prompts]
    if any(not row for row in ids) and tokenizer.bos_token_id is not None:
        ids = [row or [tokenizer.bos_token_id] for row in ids]
    streams = [_TextStream(tokenizer) for _ in ids]

    def on_token(row: int, token: int) -> None:
        piece = streams[row].push(token)
        if piece and on_text:
            on_text(row, piece)

    listener = on_token if on_text else None
    if manifest is None:
        pair = open_seq2seq(folder, threads=threads, provider=provider)
        source = texts_as_source(pair, ids)
        result = pair.write(source, max_new_tokens=max_new_tokens, sampling=sampling, on_token=listener)
    else:
        longest = max((len(row) for row in ids), default=0) + max_new_tokens
        decoder = open_decoder(folder, manifest, threads=threads, provider=provider, max_length=longest)
        result = decoder.generate(
            ids,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids(folder, tokenizer.eos_token_id),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            sampling=sampling,
            on_token=listener,
        )
    if on_text:
        for row, stream in enumerate(streams):
            if rest := stream.finish():
                on_text(row, rest)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in result.tokens]


def eos_token_ids(folder: str | Path, default: int | None = None) -> tuple[int, ...]:
    """End-of-sequence tokens from generation_config.json, else config.json, else `default`."""
    value = manifests.stated(folder).get("eos_token_id", () if default is None else default)
    return tuple(value) if isinstance(value, list | tuple) else (value,)


class _TextStream:
    """Text of a growing list of tokens, handed out once no later token can change it."""

    def __init__(self, tokenizer):
        self._tokenizer, self._tokens, self._given = tokenizer, [], ""

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
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True)

    def _hand_out(self, text: str) -> str:
        piece, self._given = text[len(self._given) :], text
        return piece


def _tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no usable tokenizer: {error}", place=str(folder), remedy="Copy the model's tokenizer files into it"
        ) from error
