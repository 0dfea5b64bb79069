"""Where PyTorch computes, and what is said where memory is short there."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from .errors import InputError, in_a_line

CPU = torch.device("cpu")
_LESS = "Take fewer or shorter samples (--samples, --sequence-length) or a smaller calibration.batch_size"
# How PyTorch says it where it has no error of its own: on the CPU, and of libraries for a GPU.
_NO_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Placement:
    """Where the blocks of a model are computed, one after another.

    Attributes:
        device: where a block is while it runs or is quantized.
        offload: activations wait in the host's memory, and come to the device a batch at a time.
    """

    device: torch.device = CPU
    offload: bool = False

    @property
    def between(self) -> torch.device:
        """Where activations wait for the next block."""
        return CPU if self.offload else self.device


HOST = Placement()


def placement_of(device: str, offload: bool = False) -> Placement:
    """The placement for a device by PyTorch's name of it, such as cpu, cuda or cuda:1.

    Raises:
        InputError: there is no such device, or this PyTorch cannot use it.
    """
    remedy = "Devices are cpu, cuda, and cuda:1 for the second GPU"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError("there is no device of this name", place=str(device), remedy=remedy) from None
    if found.type in ("cpu", "meta"):
        if found.type == "meta" or (found.index or 0) > 0:
            raise InputError("nothing can be computed there", place=device, remedy=remedy)
        return HOST
    try:
        found = torch.empty(1, device=found).device  # which has a number
    except (AssertionError, RuntimeError) as error:  # a build without CUDA says it by an assertion
        raise InputError(
            f"PyTorch {torch.__version__} cannot compute there ({in_a_line(error).split('. ')[0]})", place=device,
            remedy="Take another device, such as cpu, or install a build of PyTorch for this one",
        ) from None  # fmt: skip
    return Placement(found, offload)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory, on the host or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


@contextmanager
def computing(place: str, placement: Placement) -> Iterator[None]:
    """For what is computed at a placement: products of float32 are such, and a lack of memory says what to lower.

    Args:
        place: what is computed.

    Raises:
        InputError: there is not enough memory.
    """
    try:
        with _float32() if placement.device.type == "cuda" else nullcontext():
            yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        where = "memory" if placement.device == CPU else f"the memory of {placement.device}"
        other = "" if placement.between == CPU else ", or keep activations on the host (--offload)"
        raise InputError(f"does not fit into {where}", place=place, remedy=_LESS + other) from error


@contextmanager
def products_in(kind: str) -> Iterator[None]:
    """What float32 matrices are multiplied as.

    Args:
        kind: "float32", which changes nothing, or "bfloat16": factors are rounded to 8 significant bits and sums stay
            float32 where the processor has instructions for that, TF32 (11 bits) on a GPU, float32 anywhere else.
    """
    if kind == "float32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether float32 matrices are multiplied as bfloat16 there just now, by instructions for that."""
    asked = torch.get_float32_matmul_precision() == "medium"
    return asked and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


@contextmanager
def _float32() -> Iterator[None]:
    """No TF32, which keeps 11 bits of 24: PyTorch takes it for convolutions unasked, and for matrices where told to."""
    convolutions, matrices = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, matrices
