"""Small tokenizers, saved as transformers does: of single characters, and of both kinds that language models have."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
BYTE_BOS = 256  # of `byte_tokenizer`
LETTERS = 98  # all ids of `write_word_tokenizer`
TEXT = "The moon has phases because the sun lights one half of it, and we see it from the side. Hello you 1 2 3 45"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path, kind: str = "bytes", *, adds_bos: bool, chat: str | None = CHAT) -> Path:
    """Save a tokenizer of fewer than 400 tokens as transformers does; ids 1 and 2 begin and end a text.

    Args:
        kind: "bytes" (byte-level BPE: Llama 3, Qwen) or "spaces" (BPE with bytes to fall back on: Llama 2, Mistral).
    """
    made = _of_bytes() if kind == "bytes" else _of_spaces()
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 1)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return folder


def write_word_tokenizer(folder: Path, vocab: int = 97) -> None:
    """A byte-level tokenizer of `vocab` ids in the files of transformers: 3 specials, then printable ASCII."""
    letters = ["Ġ", *(chr(code) for code in range(33, 127))]
    tokens = ["<pad>", "<s>", "</s>", *letters][:vocab]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte: ids 0..255 in the alphabet's order, <s> is 256; in memory."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**alphabet, BOS: BYTE_BOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BYTE_BOS)]
        )
    # A small model_max_length must neither cut the text nor warn.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, model_max_length=16)


def _of_bytes() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", BOS, EOS], initial_alphabet=alphabet)
    )
    return made


def _of_spaces() -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made
