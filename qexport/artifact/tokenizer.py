"""Writing the tokenizer of a model beside what is made of it, so that other programs read the same ids.

Readers differ. transformers 4 knows no class of transformers 5 and adds a beginning-of-sequence token by class;
transformers.js reads chat templates from tokenizer_config.json alone, and cleans up spaces unless told not to;
onnxruntime-genai wants tokenizer.json, and adds special tokens by class and `add_bos_token`. So the files are those of
the source, byte for byte, and tokenizer_config.json says what the readers would otherwise see differently.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_json
from .scratch import scratch_folder

CONFIG, WHOLE = "tokenizer_config.json", "tokenizer.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_COPIED = (
    WHOLE, CONFIG, TEMPLATE, "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "normalizer.json", "tekken.json",
)  # fmt: skip
_PLAIN = "PreTrainedTokenizerFast"  # what both versions call a tokenizer that is its tokenizer.json
# Classes of transformers 5 that version 4 does not know, and that read tokenizer.json.
_SINCE_5 = (
    "TokenizersBackend", "Qwen3_5Tokenizer", "Siglip2Tokenizer", "ParakeetTokenizer", "LasrTokenizer", "EsmcTokenizer",
)  # fmt: skip
_OF_THE_LOAD = ("is_local", "local_files_only")  # transformers 5 writes how it was read into what it writes


def write_tokenizer(tokenizer, source: Path, folder: Path) -> None:
    """Write a tokenizer with the files it was made of.

    Args:
        tokenizer: what transformers 5 made of `source`.
    """
    if type(tokenizer).__module__.startswith("transformers_modules"):
        tokenizer.save_pretrained(folder)  # its code with it
    else:
        _copy(tokenizer, source, folder)
    if not (folder / CONFIG).is_file() or (tokenizer.is_fast and not (folder / WHOLE).is_file()):
        with scratch_folder() as made:
            tokenizer.save_pretrained(made)
            for name in (WHOLE, CONFIG):
                if (made / name).is_file() and not (folder / name).is_file():
                    shutil.copyfile(made / name, folder / name)
    for name, template in _templates(tokenizer).items():
        path = folder / TEMPLATE if name == "default" else folder / TEMPLATES / f"{name}.jinja"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            path.write_text(template, encoding="utf-8", newline="")
    config = read_json(folder / CONFIG)
    agreed = agreed_config(config, tokenizer)
    if agreed != config:
        text = json.dumps(agreed, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")


def agreed_config(config: Mapping[str, Any], tokenizer) -> dict[str, Any]:
    """What tokenizer_config.json has to say so that every reader makes the same of it.

    Args:
        config: what it says.
        tokenizer: what transformers 5 makes of it, whose ids are the right ones: the export was calibrated and is
            validated with them.
    """
    agreed = {key: value for key, value in config.items() if key not in _OF_THE_LOAD}
    own = agreed.get("auto_map") and not type(tokenizer).__module__.startswith("transformers_modules")
    if own:
        del agreed["auto_map"]
    if tokenizer.is_fast and (own or agreed.get("tokenizer_class") in _SINCE_5):
        agreed["tokenizer_class"] = _PLAIN
        agreed.setdefault("model_input_names", list(tokenizer.model_input_names))  # version 4 adds token_type_ids
    if isinstance(agreed.get("extra_special_tokens"), list):  # in version 4 they are named ones, in a dict
        agreed.setdefault("additional_special_tokens", agreed.pop("extra_special_tokens"))
    templates = _templates(tokenizer)
    if set(templates) == {"default"}:
        agreed["chat_template"] = templates["default"]
    elif templates:
        agreed["chat_template"] = [{"name": name, "template": text} for name, text in sorted(templates.items())]
    agreed.setdefault("clean_up_tokenization_spaces", bool(tokenizer.clean_up_tokenization_spaces))
    adds = _adds_bos(tokenizer)
    # Unless they are told, version 4 and onnxruntime-genai add one for some classes, whatever tokenizer.json says.
    taken = agreed.get("add_bos_token", adds or agreed.get("tokenizer_class") != _PLAIN)
    if adds is not None and taken is not adds:
        agreed["add_bos_token"] = adds
    return agreed


def _copy(tokenizer, source: Path, folder: Path) -> None:
    names = {*_COPIED, *(Path(name).name for name in tokenizer.vocab_files_names.values())}
    for name in sorted(names):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _templates(tokenizer) -> dict[str, str]:
    """Chat templates by name."""
    found = tokenizer.chat_template
    return {"default": found} if isinstance(found, str) else dict(found or {})


def _adds_bos(tokenizer) -> bool | None:
    """Whether it begins a text with its beginning-of-sequence token; None where it has none."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[:1] == [bos] and bare[:1] != [bos]
