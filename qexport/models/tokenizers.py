"""The tokenizer in a model's folder."""

from pathlib import Path

from transformers import AutoTokenizer

from ..artifact.files import read_json
from ..errors import reading

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt", "tekken.json",
)  # fmt: skip


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False):
    """The tokenizer of a folder; None where it has none, or one that takes code or packages that are not to be had.

    Raises:
        InputError: its files are damaged.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None  # transformers would make one without a vocabulary
    remedy = "Download it again, or remove the tokenizer's files to go on without text"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            read_json(folder / name, remedy)
    with reading(folder, "its tokenizer is damaged", remedy):
        try:
            return _checked(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
        except ImportError:
            return None
        except ValueError as error:
            if "trust_remote_code" in str(error):
                return None
            raise


def _checked(tokenizer):
    """A tokenizer that encodes and decodes: some damages show only then."""
    tokenizer.decode(tokenizer("a b")["input_ids"], skip_special_tokens=True)
    return tokenizer
