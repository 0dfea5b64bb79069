"""What can be known of a model's small files before the work begins: nothing of it is found at the end of an export."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from ..artifact.files import read_json, read_text
from ..artifact.token_ids import check_token_ids
from ..errors import InputError, reading
from .heads import reads_text

GENERATION = "generation_config.json"
# Files of a source model that have to travel with what is made of it.
LEGAL_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "NOTICE", "NOTICE.txt")
_MOST_CARD = 4 << 20  # bytes


def notes_on(folder: Path, config: PretrainedConfig, tokenizer: Any) -> tuple[str, ...]:
    """A sentence on each file that only helps, and is missing or cannot be used: an export goes on without it."""
    found: list[str] = []
    generation = generation_config(folder, found)
    if tokenizer is None and reads_text(config):
        found.append("the model has no tokenizer that can be used, so the export will take token ids only")
    if _writes(config):
        # As it is written: transformers' defaults are some model's tokens, and need not be this one's.
        said = read_json(folder / "config.json")
        nested = said.get("text_config")
        found += _on_end([generation, nested if isinstance(nested, dict) else {}, said], tokenizer)
    try:
        front_matter(folder / "README.md")
    except InputError as error:
        found.append(f"the licence that README.md may state is not carried over: {error}")
    found += [f"{name} is not a file and is left out" for name in LEGAL_FILES if (folder / name).is_dir()]
    return tuple(found)


def _writes(config: PretrainedConfig) -> bool:
    """Whether its texts need an end: a language model that is a decoder alone, as far as its class is known."""
    known = [name for name in config.architectures or () if "CausalLM" in name or "LMHead" in name]
    return not config.is_encoder_decoder and bool(known or not config.architectures)


def _on_end(configs: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[str]:
    """What is said where none of the configs names the token that ends texts."""
    if any(config.get("eos_token_id") not in (None, []) for config in configs):
        return []
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        token = f"{tokenizer.eos_token_id} ({tokenizer.eos_token!r})"
        return [f"the configs name no eos_token_id, so it is the tokenizer's: {token}"]
    return ["nothing names the token that ends texts (eos_token_id), so genai_config.json is left out"]


def generation_config(folder: Path, notes: list[str] | None = None) -> Mapping[str, Any]:
    """generation_config.json without what is null; empty, with a sentence in `notes`, where it cannot be used."""
    path = folder / GENERATION
    if not path.exists():
        return {}
    try:
        said = {key: value for key, value in read_json(path).items() if value is not None}
        check_token_ids(said, path)
    except InputError as error:
        if notes is not None:
            notes.append(f"{GENERATION} is left out: {error}")
        return {}
    return said


def front_matter(card: Path) -> Mapping[str, Any]:
    """The YAML between the first two lines of `---` of a model card; empty where there is no card, or none of it.

    Raises:
        InputError: a card that cannot be read.
    """
    if not card.exists():
        return {}
    lines: Sequence[str] = read_text(card, _MOST_CARD).splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), 0)
    with reading(card, "its front matter is not YAML"):
        found = yaml.safe_load("\n".join(lines[1:end]))
    return found if isinstance(found, dict) else {}
