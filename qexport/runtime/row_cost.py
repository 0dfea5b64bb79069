"""What several tokens in a call cost a decoder, in calls of a single token: told from its kernels and their bytes."""

from dataclasses import dataclass

from ..artifact.manifest import CPU, Manifest


@dataclass(frozen=True)
class RowCost:
    """Of a call with r tokens behind the first one: 1 + first + each · r, or 1 without any.

    Attributes:
        first: for changing the kernel; each: for every token.
    """

    first: float
    each: float

    def of(self, tokens: int) -> float:
        """What so many tokens more cost."""
        return self.first + self.each * tokens if tokens else 0.0


@dataclass(frozen=True)
class _Kernel:
    """Attributes: time: of one row, for a byte, in those of floats; first and each, see `RowCost`."""

    time: float
    first: float
    each: float


NBITS, FLOAT = "MatMulNBits", "float"
# One thread of an AVX512-VNNI machine, by samples/tokens_in_a_step.py (docs/drafts.md). At accuracy level 1 a kernel
# for several rows makes floats of all weights first.
OF_KERNEL = {
    NBITS: _Kernel(1.0, 0.0, 0.34), "MatMulIntegerToFloat": _Kernel(1.0, 0.0, 0.05), FLOAT: _Kernel(1.0, 0.0, 0.08),
}  # fmt: skip
EXACT_NBITS = _Kernel(4.0, 1.6, 0.12)
UNKNOWN = RowCost(0.0, OF_KERNEL[NBITS].each)


def row_cost(manifest: Manifest) -> RowCost:
    """What a guessed token costs.

    A call reads every weight once, so that its time goes by their bytes; what a row more costs of it is the kernel's.
    Files of which too little is known are taken for those of MatMulNBits alone.
    """
    sizes, kernels = manifest.bytes, {entry.kernel for entry in manifest.linears}
    branches = any(entry.prompt_kernel for entry in manifest.linears)
    if manifest.provider != CPU or not kernels <= set(OF_KERNEL) or branches or not sizes:
        return UNKNOWN
    read, head = dict.fromkeys(OF_KERNEL, 0.0), FLOAT
    for entry in manifest.linears:
        if entry.output == "logits":
            head = entry.kernel
        else:
            read[entry.kernel] += entry.bytes
    # An output projection that is tied to the table of embeddings reads all of it, and has no bytes of its own.
    read[head] += sizes.get("lm_head") or sizes.get("embedding", 0)
    read[FLOAT] += sizes.get("rest", 0)
    exact = manifest.session.get("session.qdq_matmulnbits_accuracy_level") != "4"
    found = [(EXACT_NBITS if exact and name == NBITS else OF_KERNEL[name], size) for name, size in read.items()]
    total = sum(kernel.time * size for kernel, size in found)
    return RowCost(
        sum(kernel.time * size * kernel.first for kernel, size in found) / total,
        sum(kernel.time * size * kernel.each for kernel, size in found) / total,
    )
