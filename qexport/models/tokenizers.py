"""The tokenizer in a model's folder."""

import logging
from functools import cache, lru_cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..artifact.files import read_json
from ..errors import reading

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt", "tekken.json",
)  # fmt: skip


@cache
def _warn_once(folder: Path, said: str) -> None:
    logger.warning("%s: %s", folder, said)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False):
    """The tokenizer of a folder; None where it has none, or one that takes code or packages that are not to be had.

    One that is code of its own, which is not trusted, is made of its tokenizer.json where there is one, with a warning.
    Every stage of an export asks for it and reading takes half a second, so the last one is kept: leave it as it is.

    Raises:
        InputError: its files are damaged.
    """
    stats = [file.stat() for file in sorted(folder.glob("*")) if file.is_file()]
    return _loaded(folder, trust_remote_code, tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats))


@lru_cache(maxsize=1)
def _loaded(folder: Path, trust_remote_code: bool, stamp: tuple):
    """As `load_tokenizer`; stamp: of the folder's files, which may change."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None  # transformers would make one without a vocabulary
    remedy = "Download it again, or remove the tokenizer's files to continue without text"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            read_json(folder / name, remedy)
    with reading(folder, "its tokenizer is damaged", remedy):
        try:
            # Never asking the Hub about a folder: its answer would change the result.
            options = dict(local_files_only=True, trust_remote_code=trust_remote_code)
            return _checked(AutoTokenizer.from_pretrained(folder, **options))
        except ImportError:
            return None
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
        if not (folder / "tokenizer.json").is_file():
            _warn_once(folder, "its tokenizer is code of its own, left out here: --trust-remote-code runs it")
            return None
        _warn_once(folder, "its tokenizer is read without code of its own: --trust-remote-code runs that")
        return _checked(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))


def _checked(tokenizer):
    """A tokenizer that encodes and decodes: some damages show only then."""
    tokenizer.decode(tokenizer("a b")["input_ids"], skip_special_tokens=True)
    return tokenizer
