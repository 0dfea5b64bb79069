"""What the blocks of the float model hand on, on disk: having run on the calibration data once, it need not again."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..artifact.scratch import Scratch, system
from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..device import CPU
from ..errors import InputError
from .block_activations import Stream

_MOST = 2 << 30  # bytes on the disk; beyond, the model runs again


class HandedOn:
    """What each float block but the last hands on, in temporary files until they are forgotten."""

    def __init__(self) -> None:
        self._scratch: Scratch | None = None
        self._blocks = 0

    def note(self, captured: CapturedModel, index: int, stream: Stream) -> None:
        """Keep what a block has handed on in a stream that has just passed it; blocks come in order.

        Nothing is kept where all blocks would take more than 2 GB or half of what is free on the disk.
        """
        if index != self._blocks:
            return
        name = captured.handed_on(captured.blocks[index])
        values = {str(number): batch[name] for number, batch in enumerate(stream.batches) if name in batch}
        size = sum(value.nbytes for value in values.values()) * len(captured.blocks)
        try:
            if len(values) < len(stream.batches) or index == 0 and not 0 < size <= min(_MOST, _free() // 2):
                return
            self._scratch = self._scratch or Scratch()
            save_file({number: value.to(CPU).contiguous() for number, value in values.items()}, self._place(index))
        except (OSError, SafetensorError, InputError):  # no room, and it can be done without
            self.forget()
        else:
            self._blocks += 1

    def forget(self) -> None:
        """Remove the files."""
        if self._scratch is not None:
            self._scratch.cleanup()
        self._scratch, self._blocks = None, 0

    def stream(self, captured: CapturedModel) -> "KeptStream | None":
        """All of it, from the first block on; None where it is not there."""
        if self._blocks < max(len(captured.blocks) - 1, 1):
            return None
        return KeptStream(captured, [self._place(index) for index in range(self._blocks)])

    def _place(self, index: int) -> Path:
        assert self._scratch is not None
        return Path(self._scratch.name) / f"{index:04d}.safetensors"


class KeptStream:
    """A `Reference` that reads what was kept; in front of the first block it has nothing."""

    def __init__(self, captured: CapturedModel, places: Sequence[Path]):
        self._captured, self._places = captured, places
        self.batches: list[dict[str, Tensor]] = []

    def advance(self, block: Block, index: int) -> None:
        """Go on to what is there behind a block, which need not be loaded."""
        name, kept = self._captured.handed_on(block), load_file(self._places[index])
        self.batches = [{name: kept[str(number)]} for number in range(len(kept))]


def _free() -> int:
    """Bytes, where temporary files go."""
    return shutil.disk_usage(system()).free
