"""What a study is given, checked before any weight is read: folders, their model, prompts that fit."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..artifact import manifest as manifests
from ..artifact.manifest import MODEL_FILE, Manifest
from ..capture.graph import CapturedModel
from ..errors import InputError
from ..formatting import megabytes
from ..runtime.genai import context_length
from ..runtime.generate import eos_token_ids
from ..validation.account import transforms
from ..validation.reference import check_same_model

FLOAT = "float"


@dataclass(frozen=True)
class Subject:
    """One export; of an encoder-decoder `manifest` is its decoder's.

    Attributes:
        name: of its format.
        piece: most new tokens in one call that computes what single steps do; None: any number.
        model_bytes: of the ONNX file and its data.
    """

    name: str
    folder: Path
    manifest: Manifest
    piece: int | None
    model_bytes: int


def named_folders(folders: Sequence[str | os.PathLike]) -> list[tuple[str, Path]]:
    """Folders of exports with their names, the whole path where names are not enough.

    Raises:
        InputError: none is given, or one is given twice.
    """
    if not folders:
        raise InputError("no export to study", remedy="Give at least one folder that `qexport export` wrote")
    paths = [Path(folder) for folder in folders]
    repeated = [path for path, count in Counter(p.resolve() for p in paths).items() if count > 1]
    if repeated:
        raise InputError("the same folder twice", place=str(repeated[0]), remedy="Give it once")
    counts = Counter(path.resolve().name for path in paths)
    names = (path.resolve().name for path in paths)
    return [
        (name if counts[name] == 1 and name != FLOAT else str(path.resolve()), path)
        for name, path in zip(names, paths, strict=True)
    ]


def open_subjects(folders: Sequence[str | os.PathLike]) -> list[Subject]:
    """The exported decoders.

    Raises:
        InputError: a folder is none, or as `named_folders`.
    """
    found = []
    for name, path in named_folders(folders):
        plan = manifests.load(path)
        if plan.kind != "decoder":
            raise InputError(
                f"this export is a {plan.kind}, and a study lets decoders write", place=str(path),
                remedy="Give exports of a causal language model",
            )  # fmt: skip
        size = sum(file.stat().st_size for file in path.glob(f"{MODEL_FILE}*") if file.is_file())
        found.append(Subject(name, path, plan, _piece(plan), size))
    return found


def check_subjects(subjects: Sequence[Subject], captured: CapturedModel) -> None:
    """Refuse exports of another model than the reference.

    Raises:
        InputError: as said.
    """
    for subject in subjects:
        check_same_model(captured, subject.manifest, subject.folder, transformed=transforms(subject.folder))


def check_memory(size: int, subjects: Sequence[Subject]) -> None:
    """Refuse more models than memory holds.

    Args:
        size: bytes of the float model.

    Raises:
        InputError: as said.
    """
    needed = size + sum(subject.model_bytes for subject in subjects)
    free = psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"the float model and {len(subjects)} exports take {megabytes(needed)} together, and {megabytes(free)} are "
            "free",
            remedy="Study fewer exports at once",
        )


def prompt_tokens(captured: CapturedModel, prompts: Sequence[str], longest: int) -> tuple[list[list[int]], set[int]]:
    """Token ids of the prompts, and the tokens that end a text.

    Args:
        longest: new tokens that have to fit behind every prompt.

    Raises:
        InputError: the model has no tokenizer, or a prompt does not fit.
    """
    source = captured.origin
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise InputError("prompts need a tokenizer", place=source.name, remedy="Put its files beside the model")
    context, ids = context_length(source.path), []
    for text in prompts:
        row = tokenizer(text)["input_ids"]
        if context is not None and len(row) + longest > context:
            raise InputError(
                f"{len(row)} tokens and {longest} new ones do not fit: the model reads {context}",
                place=f"prompt {text[:40]!r}", remedy="Give a shorter prompt or fewer new tokens",
            )  # fmt: skip
        ids.append(row)
    return ids, set(eos_token_ids(source.path, tokenizer.eos_token_id))


def _piece(plan: Manifest) -> int | None:
    if plan.settings.get("logits") == "last":
        return 1
    prompts_from = plan.settings.get("prompts_from")
    return prompts_from - 1 if prompts_from else None
