"""What `qexport optimize` prints."""

from ...formatting import megabytes
from ...runtime.optimized import OptimizedInfo


def print_optimized(result: OptimizedInfo) -> None:
    """What it costs, what it brings, and how long it is good for."""
    before, after = result.load_seconds["before"], result.load_seconds["after"]
    shared = f" and shares {megabytes(result.shared_bytes)} with it" if result.shared_bytes else ""
    print(f"{result.folder}: {megabytes(result.bytes)} beside a model of {megabytes(result.model_bytes)}{shared}")
    print(f"  load: {after:.3f} s instead of {before:.3f} s (medians of {len(result.samples['after'])}, in turns)")
    print("  used on this processor, with this version of ONNX Runtime, until the model changes; delete it to undo")
