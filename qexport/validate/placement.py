"""Which operators and providers ONNX Runtime chose for an export."""

from collections import Counter
from pathlib import Path

from ..runtime.manifest import Manifest
from ..runtime.session import OptimizedGraph, kernel_of, optimized_graph, unfused
from .report import Placement, Unfused


def examine(folder: Path, manifest: Manifest, provider: str) -> tuple[Placement, OptimizedGraph]:
    """Load the model once and say where it runs and which planned linears became their kernel.

    Raises:
        RuntimeProblem: ONNX Runtime refuses the model or does not have the provider.
    """
    graph = optimized_graph(folder, manifest, provider=provider)
    wrong = tuple(
        Unfused(name=linear.name, expected=linear.kernel, found=found)
        for linear, found in unfused(graph, manifest.linears)
    )
    kernels = Counter(kernel_of(graph.nodes, linear.output, linear.node) or "nothing" for linear in manifest.linears)
    placement = Placement(
        provider=provider, nodes_per_provider=dict(graph.nodes_per_provider()),
        op_counts=dict(graph.op_counts().most_common()), kernels=dict(kernels.most_common()), unfused=wrong,
    )  # fmt: skip
    return placement, graph


def moved(plain: OptimizedGraph, probed: OptimizedGraph, manifest: Manifest) -> tuple[Unfused, ...]:
    """Linears whose operator differs between the deployed graph and one with additional outputs."""
    pairs = [
        (linear.name, *(kernel_of(g.nodes, linear.output, linear.node) for g in (plain, probed)))
        for linear in manifest.linears
    ]
    return tuple(Unfused(name=n, expected=was or "nothing", found=now) for n, was, now in pairs if was != now)
