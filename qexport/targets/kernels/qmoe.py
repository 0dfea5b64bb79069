"""What ONNX Runtime's kernel for quantized mixtures of experts, QMoE, takes on each provider."""

from ...lower.moe_form import MoeForm

_INTERLEAVE = 64  # input features of a tile of CUDA's weights; a part of a tile is read beyond its end
_CUDA_BLOCKS = (32, 64, 128)
_CUDA_GATES = ("swiglu", "silu", "relu")  # nothing that it may approximate in another way


def why_dense_on_cpu(form: MoeForm, accuracy_level: int) -> str:
    """Why the CPU provider cannot run a mixture as its recipe says; empty where it can."""
    if (form.up.bits == 8 or form.up.floats) and accuracy_level != 4:
        what = f"{form.up.floats} weights, which become 8-bit integers," if form.up.floats else "8-bit weights"
        return f"QMoE rounds what {what} read to 8 bits, and accuracy level {accuracy_level} keeps it float"
    return ""


def why_dense_on_cuda(form: MoeForm) -> str:
    """Why the CUDA provider cannot run a mixture; empty where it can."""
    if form.hidden % _INTERLEAVE or form.inner % _INTERLEAVE:
        return f"{form.hidden} and {form.inner} input features are not multiples of {_INTERLEAVE}"
    if not form.up.floats and form.block_size not in _CUDA_BLOCKS:
        return f"CUDA's QMoE takes groups of {', '.join(map(str, _CUDA_BLOCKS))}, not of {form.block_size}"
    if form.gate.activation not in _CUDA_GATES:
        return f"what {form.gate.activation} is to CUDA's QMoE is not known"
    return ""
