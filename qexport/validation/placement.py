"""Which operators and providers ONNX Runtime chose for an export."""

import math
from collections import Counter
from pathlib import Path

from ..artifact.branches import PROMPTS
from ..artifact.manifest import FLOAT, LinearEntry, Manifest
from ..runtime.session import OptimizedGraph, kernel_of, node_of, optimized_graph, unfused, unfused_convolutions
from .report import Placement, Unfused, ValueComparison

_INSIDE = "part of a float operator"


def examine(folder: Path, manifest: Manifest, provider: str) -> tuple[Placement, OptimizedGraph]:
    """Load the model once and say where it runs and which planned linears became their kernel.

    Raises:
        RuntimeProblem: ONNX Runtime refuses the model or does not have the provider.
    """
    graph = optimized_graph(folder, manifest, provider=provider)
    wrong = tuple(
        Unfused(name=linear.name, expected=expected(linear, found), found=found)
        for linear, found in unfused(graph, manifest.linears)
    )
    wrong += tuple(
        Unfused(name=name, expected=kernel, found=found)
        for name, kernel, found in unfused_convolutions(graph, manifest.convolutions)
    )
    kernels = Counter(
        kernel_of(graph.nodes, linear.output, linear.node) or (_INSIDE if linear.scheme == FLOAT else "nothing")
        for linear in manifest.linears
    )
    prompts = Counter(
        kernel_of(graph.nodes, PROMPTS + linear.output, PROMPTS + linear.node) or "nothing"
        for linear in manifest.linears
        if linear.prompt_kernel
    )
    placement = Placement(
        provider=provider, nodes_per_provider=dict(graph.nodes_per_provider()),
        op_counts=dict(graph.op_counts().most_common()), kernels=dict(kernels.most_common()),
        prompt_kernels=dict(prompts.most_common()), unfused=wrong,
        convolutions=len(manifest.convolutions),
    )  # fmt: skip
    return placement, graph


def expected(linear: LinearEntry, found: str | None) -> str:
    """The operator that a linear should have where it has another one."""
    return linear.prompt_kernel if linear.prompt_kernel and found == linear.kernel else linear.kernel


def placed(row: ValueComparison, linear: LinearEntry, graph: OptimizedGraph) -> ValueComparison:
    """A linear's row with its size in the file, and with the operator that computes it and where.

    Of a file with branches these are those for prompts, as all that is measured is.
    """
    prefix = PROMPTS if linear.prompt_kernel else ""
    node = node_of(graph.nodes, prefix + linear.output, prefix + linear.node)
    providers = {provider for _, _, provider in graph.placement}
    alone = next(iter(providers)) if len(providers) == 1 else ""
    return row.model_copy(update={
        "bytes": linear.bytes, "bits": 8 * linear.bytes / math.prod(linear.shape) if linear.bytes else None,
        "kernel": node.op_type if node else "", "provider": (node and node.provider) or alone,
    })  # fmt: skip


def moved(plain: OptimizedGraph, probed: OptimizedGraph, manifest: Manifest) -> tuple[Unfused, ...]:
    """Linears whose operator differs between the deployed graph and one with additional outputs.

    Args:
        probed: of a file with branches, the one for prompts alone.
    """
    pairs = []
    for linear in (linear for linear in manifest.linears if linear.scheme != FLOAT):
        prefix = PROMPTS if linear.prompt_kernel else ""
        was = kernel_of(plain.nodes, prefix + linear.output, prefix + linear.node)
        pairs.append((linear.name, was, kernel_of(probed.nodes, linear.output, linear.node)))
    return tuple(Unfused(name=n, expected=was or "nothing", found=now) for n, was, now in pairs if was != now)
