"""Which products of 8-bit inputs take longer than those of floats on the CPU: few outputs do not pay for rounding."""

from collections.abc import Sequence

from ...plan.linear_plan import LinearPlan

_FEW = 16


def slow_integers(plan: Sequence[LinearPlan]) -> str:
    """Which linears are slower with 8-bit inputs than in float, however many rows there are; empty where none is.

    Measured by samples/small_linears.py (one thread, AVX512-VNNI; samples/results/small_linears.md). Few inputs do so
    too in `dynamic` schemes, but not at every number of outputs, and what shares its inputs with others is one product.
    """
    slow = [p.name for p in plan if p.scheme is not None and p.scheme.integer and p.shape[0] <= _FEW]
    if not slow:
        return ""
    return (
        f"{len(slow)} of {len(plan)} linears are slower than in float32, as they have 8-bit inputs and at most {_FEW} "
        f"outputs ({slow[0]}{', …' if len(slow) > 1 else ''}); an override with the scheme float leaves them in float"
    )
