"""A decoder's step as a CUDA graph: launched as one, where its kernels would wait for the host one by one.

The graph reads and writes the same memory on every run. So the mask is as long as the cache, growing from the right:
what is left of it counts as padding, and the numbers are those of a mask that grows.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import onnxruntime as ort

from ..artifact.cache_names import present_of
from ..artifact.manifest import Manifest
from .values import ELEMENT_TYPES, array_of

OPTIONS = {"enable_cuda_graph": "1"}  # of a session that can record
# Copies its table from the host's stack on every run, which is gone when a graph is replayed: NaN on an H200.
_UNRECORDABLE = {"MatMulBnb4"}
_ENTRY = "gpu_graph_id"
_numbers = itertools.count(1)


def can_record(manifest: Manifest) -> bool:
    """Whether every linear of a file computes the same when its step is replayed."""
    kernels = {kernel for linear in manifest.linears for kernel in (linear.kernel, *dict(linear.parts).values())}
    return not kernels & _UNRECORDABLE


def unrecorded() -> ort.RunOptions:
    """What a session with `OPTIONS` runs with when a run is not to be recorded, such as a prompt."""
    options = ort.RunOptions()
    options.add_run_config_entry(_ENTRY, "-1")
    return options


class RecordedStep:
    """One token for every row of a batch, with a shared cache.

    The first run records, the next ones replay; another object records anew.

    Args:
        session: opened with `OPTIONS`.
        cache: the shared cache on the device, by the name of its input.
        given: other inputs, on the device.
        vocab: entries of a row of logits.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        cache: Mapping[str, ort.OrtValue],
        given: Mapping[str, ort.OrtValue],
        vocab: int,
    ):
        self._session, self._binding, self._options = session, session.io_binding(), ort.RunOptions()
        self._options.add_run_config_entry(_ENTRY, str(next(_numbers)))
        batch, _, length, _ = next(iter(cache.values())).shape()
        sizes = {"input_ids": 1, "position_ids": 1, "attention_mask": length}
        present = {value.name for value in session.get_inputs()}
        self._inputs = {
            name: ort.OrtValue.ortvalue_from_shape_and_type([batch, size], np.int64, "cuda", 0)
            for name, size in sizes.items()
            if name in present
        }
        self._mask = np.zeros((batch, length), np.int64)
        kind = ELEMENT_TYPES[next(value.type for value in session.get_outputs() if value.name == "logits")]
        self._logits, self._host = (
            ort.OrtValue.ortvalue_from_shape_and_type([batch, 1, vocab], kind, *place) for place in (("cuda", 0), ())
        )
        for name, value in {**self._inputs, **cache, **given}.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in cache.items():
            self._binding.bind_ortvalue_output(present_of(name), value)
        self._binding.bind_ortvalue_output("logits", self._logits)

    def run(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The logits [batch, 1, vocab]: memory that the next run writes into.

        Args:
            ids, positions: of the new tokens, int64 [batch, 1].
            mask: of all tokens, int64 [batch, tokens].
        """
        self._mask[:, -mask.shape[1] :] = mask
        feeds = {"input_ids": ids, "position_ids": positions, "attention_mask": self._mask}
        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(feeds[name]))
        self._session.run_with_iobinding(self._binding, self._options)
        self._host.update_inplace(self._logits)
        return array_of(self._host)
