"""ONNX Runtime sessions that run a file with the options its numbers depend on, or not at all."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort

from ..artifact import checksums
from ..artifact import manifest as manifests
from ..artifact.branches import PROMPTS, all_nodes
from ..artifact.manifest import CPU, FLOAT, MODEL_FILE, ConvolutionEntry, LinearEntry, Manifest
from ..artifact.output import restore
from ..artifact.owner import Busy
from ..artifact.scratch import scratch_folder
from ..errors import RuntimeProblem
from . import optimized_cache as cache
from .provider import chosen_provider, why_missing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizedNode:
    """A node of the optimized graph; outputs are value names, domain "" is ONNX itself.

    provider: the execution provider that runs it; None where it cannot be told (a node that optimization made).
    """

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    provider: str | None


@dataclass(frozen=True)
class OptimizedGraph:
    """What ONNX Runtime really runs.

    Attributes:
        nodes: nodes after every optimization. Where a file has branches, the names of those for prompts have a prefix.
        placement: (node name, op type, provider) of every node when the graph was cut between providers. That comes
            before the last fusions, so a quantized linear still shows as DequantizeLinear and MatMul here.
    """

    nodes: tuple[OptimizedNode, ...]
    placement: tuple[tuple[str, str, str], ...]

    def op_counts(self) -> Counter[str]:
        return Counter(node.op_type for node in self.nodes)

    def nodes_per_provider(self) -> Counter[str]:
        """How many nodes each provider took."""
        return Counter(provider for _, _, provider in self.placement)


@dataclass(frozen=True)
class ModelInFolder:
    """A model in memory whose tensors are in the files of a folder, as if it were a file in it.

    ONNX Runtime refuses tensors that lie, or are linked, outside of the folder of a model's file.

    Attributes:
        model: a serialized ModelProto.
    """

    folder: Path
    model: bytes


def open_session(
    source: str | Path | ModelInFolder,
    manifest: Manifest | None = None,
    *,
    threads: int | None = None,
    provider: str | None = None,
    outputs_path: str | Path | None = None,
    record_assignment: bool = False,
    optimize: bool = False,
    profile_prefix: str | Path | None = None,
    provider_options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Load an exported model with the session options of its manifest.

    Where `qexport.optimize` left a copy in the folder that still fits, the copy is loaded: the same numbers, sooner and
    with less memory. Nothing is ever written into the folder unasked.

    Args:
        source: an exported folder, an ONNX file, or what stands for one. A file is loaded as it is, without the
            optimized copy.
        manifest: what the file says about itself; read from the folder (or from the file's folder) when absent.
        threads: threads within an operator; None lets ONNX Runtime take every physical core.
        provider: run on this provider instead of the one the file was made for: cpu, cuda, or ONNX Runtime's name.
        outputs_path: also write the optimized model here, its weights beside it.
        record_assignment: remember which provider takes which node (see `optimized_graph`).
        optimize: make the optimized copy first, as `qexport.optimize` does, where the folder has none that fits.
        profile_prefix: measure every node of every run; `end_profiling` of the session writes a file whose path begins
            with this, and returns it. The optimized copy is not used then.
        provider_options: options of the provider, such as {"enable_cuda_graph": "1"}.

    Raises:
        InputError: the folder is no export, or no provider is called so; with `optimize`, it cannot be written or was
            not made for the CPU.
        RuntimeProblem: the provider does not load (the session never falls back to another one), or ONNX Runtime
            refuses the model.
    """
    source = source if isinstance(source, ModelInFolder) else Path(source)
    if isinstance(source, Path):
        restore(source)
    whole = isinstance(source, Path) and source.is_dir()
    folder = source.folder if isinstance(source, ModelInFolder) else source if whole else source.parent
    manifest = manifest or manifests.load(folder)
    name = Path(manifest.settings.get("filename", MODEL_FILE)).name
    path = folder / name if whole else source
    wanted = chosen_provider(provider, manifest)
    if whole:
        checksums.check_sample(folder)
    if whole and name == MODEL_FILE and outputs_path is None and not record_assignment and not profile_prefix:
        if optimize and cache.find(folder, manifest, wanted) is None:
            from .optimized import build  # it opens sessions itself

            with suppress(Busy):  # who is at it will have it made; until then the export itself does
                build(folder, manifest)
        copy = cache.find(folder, manifest, wanted)
        if copy is not None:
            with suppress(RuntimeProblem):  # a damaged copy must not keep the export from loading
                logger.debug("%s is loaded in place of the model", copy)
                return start(copy, session_options(manifest, threads, optimized=True), wanted)
    options = session_options(manifest, threads)
    if outputs_path is not None:
        options.optimized_model_filepath = str(outputs_path)
        # One protobuf holds 2 GB at most, and the nodes are wanted without the weights.
        data = f"{Path(outputs_path).stem}.data"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_prefix)
    if record_assignment:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    logger.debug("%s opens on %s with %s", folder, wanted, manifest.session)
    try:
        return start(path, options, wanted, provider_options)
    except RuntimeProblem as error:
        if manifest.dtype != "bfloat16" or wanted != CPU:
            raise
        raise RuntimeProblem(
            "computes in bfloat16, and ONNX Runtime has few bfloat16 kernels for the CPU", place=str(folder),
            remedy=f"Run it on {manifest.provider}, or export it with dtype float16",
        ) from error  # fmt: skip


def session_options(manifest: Manifest, threads: int | None = None, *, optimized: bool = False) -> ort.SessionOptions:
    """The options that the numbers of an export depend on.

    Args:
        threads: threads within an operator; None lets ONNX Runtime take every physical core.
        optimized: for a graph that is optimized already.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # warnings are about placement and hardware; checks here report both
    if optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in manifest.session.items():
        options.add_session_config_entry(key, value)
    return options


def start(
    source: Path | ModelInFolder,
    options: ort.SessionOptions,
    provider: str,
    provider_options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Load a model on one provider, or not at all.

    Args:
        provider_options: of that provider.

    Raises:
        RuntimeProblem: as `open_session`.
    """
    path, model = (source.folder, source.model) if isinstance(source, ModelInFolder) else (source, source)
    if isinstance(source, ModelInFolder):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path))
    if provider not in ort.get_available_providers():
        raise _missing(provider, path)
    first = (provider, dict(provider_options or {}))
    try:
        session = ort.InferenceSession(model, options, providers=[first] if provider == CPU else [first, CPU])
    except Exception as error:  # onnxruntime has one exception class for each status code and no base class
        raise RuntimeProblem(
            f"ONNX Runtime refuses the model: {str(error).strip()}", place=str(path), remedy="See `qexport doctor`"
        ) from error
    # A provider whose libraries are missing is dropped with a line in the log and nothing else.
    if provider not in session.get_providers():
        raise _missing(provider, path)
    session.disable_fallback()
    return session


def optimized_graph(
    source: str | Path | ModelInFolder, manifest: Manifest | None = None, *, provider: str | None = None
) -> OptimizedGraph:
    """Load the model and return the graph that ONNX Runtime made of it, with the provider of each node.

    The optimized weights go to a temporary file and are not read back; it needs as much free disk as the model.

    Raises: as `open_session`.
    """
    with scratch_folder() as folder:
        target = folder / "optimized.onnx"
        session = open_session(source, manifest, provider=provider, outputs_path=target, record_assignment=True)
        placement = tuple(
            (node.name, node.op_type, group.ep_name)
            for group in session.get_provider_graph_assignment_info()
            for node in group.get_nodes()
        )
        del session
        graph = onnx.load(target, load_external_data=False).graph
    providers = {name: provider for name, _, provider in placement if name}
    nodes = tuple(
        OptimizedNode(n.name, n.op_type, n.domain, tuple(n.input), tuple(n.output), providers.get(n.name))
        for n in all_nodes(graph)
    )
    return OptimizedGraph(nodes, placement)


def kernel_of(nodes: Iterable[OptimizedNode], output: str, node: str = "") -> str | None:
    """Op type that computes a linear in the optimized graph, or None when neither name is there.

    Fusion gives the fused node the name of the MatMul, which is therefore asked first; the value name is lost when a
    bias, a scale or the graph's output is folded in.

    Args:
        nodes: nodes of the optimized graph.
        output: name of the value that the linear produced before optimization.
        node: name of its MatMul node.
    """
    found = node_of(nodes, output, node)
    return found.op_type if found else None


# Behind the name of a node that ONNX Runtime wrote anew, in front of a number.
_REWRITTEN = "_token_"


def node_of(nodes: Iterable[OptimizedNode], output: str, node: str = "") -> OptimizedNode | None:
    """The node that computes a linear, see `kernel_of`."""
    by_value = None
    for candidate in nodes:
        if node and node in (candidate.name, candidate.name.partition(_REWRITTEN)[0]):
            return candidate
        if output and output in candidate.outputs:
            by_value = candidate
    return by_value


# The same product where another of static values alone reads the result, which is rounded within.
_ROUNDING = {"MatMulIntegerToFloat": ("QLinearMatMul",)}


def unfused(graph: OptimizedGraph, linears: Sequence[LinearEntry]) -> list[tuple[LinearEntry, str | None]]:
    """The planned linears that did not become their kernel in all products, each with the op type found instead."""
    wrong = []
    by_name = {node.name: node.op_type for node in graph.nodes}
    for linear in (linear for linear in linears if linear.scheme != FLOAT):
        products = [(kernel_of(graph.nodes, linear.output, linear.node), linear.kernel)]
        if linear.prompt_kernel:
            output, node = PROMPTS + linear.output, PROMPTS + linear.node
            products.append((kernel_of(graph.nodes, output, node), linear.prompt_kernel))
        products += [(by_name.get(node), kernel) for node, kernel in linear.parts]
        others = [found for found, kernel in products if found not in (kernel, *_ROUNDING.get(kernel, ()))]
        wrong += [(linear, found) for found in others[:1]]
    return wrong


def unfused_convolutions(
    graph: OptimizedGraph, planned: Sequence[ConvolutionEntry]
) -> list[tuple[str, str, str | None]]:
    """(name, kernel, op type found instead) of the planned convolutions that did not become their kernel."""
    found = {node.name.partition(_REWRITTEN)[0]: node.op_type for node in graph.nodes if "Conv" in node.op_type}
    return [(e.name, e.kernel, found.get(e.name)) for e in planned if found.get(e.name) != e.kernel]


def _missing(provider: str, path: Path) -> RuntimeProblem:
    remedy = "See `qexport doctor`"
    if provider != CPU:
        remedy += ", or run the file on the CPU with provider cpu"
    return RuntimeProblem(f"{provider} is not available: {why_missing(provider)}", place=str(path), remedy=remedy)
