"""The models of a study, loaded: decoders in one file, and the float model beside them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..calibrate.float_model import float_bytes, running
from ..capture.decoder import capture_decoder
from ..capture.graph import CapturedModel
from ..models.source import open_model
from ..progress import Progress
from ..runtime.decoder import open_decoder
from .subjects import FLOAT, Subject, check_memory, check_subjects, open_subjects, prompt_tokens
from .writers import ExportWriter, FloatWriter, Writer


@dataclass(frozen=True)
class Loaded:
    """What takes turns at writing, and about what.

    Attributes:
        reference: the float model's name; float_bytes: of its weights in float32.
        own: the float model; exports: one for each of `subjects`.
        prompts: token ids; ends: tokens that end a text.
    """

    reference: str
    float_bytes: int
    own: Writer
    exports: Sequence[Writer]
    subjects: Sequence[Subject]
    prompts: Sequence[Sequence[int]]
    ends: set[int]


@dataclass(frozen=True)
class Asked:
    """What a study is called with, see there; longest: new tokens of a text at most."""

    folders: Sequence[str | os.PathLike[str]]
    reference: str | os.PathLike[str] | CapturedModel
    texts: Sequence[str]
    longest: int
    threads: int | None
    provider: str | None
    trust_remote_code: bool
    progress: Progress


@contextmanager
def decoders(asked: Asked) -> Iterator[Loaded]:
    """Causal decoders, whose prompts they continue; in memory inside the `with`.

    Raises:
        InputError, RuntimeProblem: as `study`.
    """
    subjects, progress = open_subjects(asked.folders), asked.progress
    captured = asked.reference if isinstance(asked.reference, CapturedModel) else capture_decoder(
        open_model(asked.reference, trust_remote_code=asked.trust_remote_code)
    )  # fmt: skip
    check_subjects(subjects, captured)
    size = float_bytes(captured)
    check_memory(size, subjects)
    ids, ends = prompt_tokens(captured, asked.texts, asked.longest)
    room = max(map(len, ids)) + asked.longest
    with running(captured) as run:
        exports = []
        for done, subject in enumerate(subjects):
            progress("load", subject.name, done, len(subjects))
            decoder = open_decoder(
                subject.folder, subject.manifest, threads=asked.threads, provider=asked.provider, max_length=room
            )
            exports.append(ExportWriter(subject.name, decoder, subject.piece))
        progress("load", "", len(subjects), len(subjects))
        yield Loaded(captured.origin.name, size, FloatWriter(FLOAT, run), exports, subjects, ids, ends)
