"""What deployed linears make of white noise: their weights, in whatever form the file has them.

On a text a few channels carry most of a value, and the errors of the weights behind them hide all others. Noise in
every channel alike weighs every weight alike, so a scale that is wrong stands out of the rounding around it.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from ..artifact.branches import PROMPTS, only
from ..artifact.manifest import MODEL_FILE, LinearEntry, Manifest
from ..capture.graph import CapturedModel
from ..graph.sites import linears
from ..quant.float_types import FLOAT_TYPES
from ..runtime.session import ModelInFolder, open_session
from .anomalies import fault_of_weight, grid_of
from .feature_orders import FeatureOrders
from .reference import BlockComparison, channelwise
from .running import run_session

ROWS = 256
_UNEXPLAINED = 0.01  # of what linears read; a cache of 4 bits leaves less
_SIGNAL = 0.01  # of a channel, of the median channel's
_CUT = "noise/"  # in front of the names of values that are given instead of computed


@dataclass(frozen=True)
class NoiseResponse:
    """What a linear made of noise: x float32 [ROWS, K], y float32 [ROWS, N]."""

    x: Tensor
    y: Tensor


class NoiseProbe:
    """The linears of a deployed file, each on its own.

    Args:
        limits: what static quantization lets through, by the name of the value; see `ranges.static_limits`.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, limits: Mapping[str, tuple[float, float]],
        threads: int | None = None, provider: str | None = None,
    ):  # fmt: skip
        self._folder, self._manifest, self._limits = folder, manifest, limits
        self._threads, self._provider = threads, provider
        self._model = only(onnx.load(folder / MODEL_FILE, load_external_data=False), PROMPTS)
        self._makers = {name: node for node in self._model.graph.node for name in node.output}
        self._orders = FeatureOrders(manifest.readable)

    def run(
        self, entries: Sequence[LinearEntry], channels: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, NoiseResponse]:
        """What linears read and make; those that read something else besides are left out.

        Args:
            channels: by the name of a value one such value, whose rank and dtype are taken, and bool [K]: the channels
                that are not to be silent.

        Raises:
            RuntimeProblem: ONNX Runtime fails.
        """
        random = torch.Generator().manual_seed(0)
        noise = {}
        for value, (_, loud) in channels.items():
            # Signs are on every symmetric grid: rounding the input adds nothing to the errors of the weight.
            size = self._limits.get(value, (0.0, 1.0))[1]
            noise[value] = (torch.randint(0, 2, (ROWS, len(loud)), generator=random) * 2.0 - 1) * size * loud
        nodes = {e.output: found for e in entries if (found := self._between(e.output, set(noise))) is not None}
        if not nodes:
            return {}
        types = {value: FLOAT_TYPES[like.dtype].onnx for value, (like, _) in channels.items()}
        session = open_session(self._part(nodes, types), self._manifest, threads=self._threads, provider=self._provider)
        feeds = {}
        for port in session.get_inputs():
            value = port.name.removeprefix(_CUT)
            shape = (1,) * (channels[value][0].dim() - 2) + noise[value].shape
            feeds[port.name] = self._orders.in_file(value, noise[value].reshape(shape))
        made = run_session(session, feeds, list(nodes))
        heard = {}
        for entry in entries:
            if entry.output in made:
                whole = self._orders.natural(entry.output, made[entry.output])
                y = whole.flatten(0, -2)[:, slice(*(entry.columns or (None,)))]
                heard[entry.name] = NoiseResponse(noise[entry.input], y.float())
        return heard

    def _between(self, output: str, given: set[str]) -> set[str] | None:
        """First outputs of the nodes between given values and an output; None where it needs more than these."""
        constants = {tensor.name for tensor in self._model.graph.initializer}
        nodes, waiting, first = set(), [output], True
        while waiting:
            name = waiting.pop()
            if name == "" or name in constants or (name in given and not first):
                continue
            first = False
            if name not in self._makers:
                return None
            if (node := self._makers[name]).output[0] not in nodes:
                nodes.add(node.output[0])
                waiting += node.input
        return nodes

    def _part(self, nodes: Mapping[str, set[str]], given: Mapping[str, int]) -> ModelInFolder:
        graph, wanted = self._model.graph, set().union(*nodes.values())
        part = onnx.ModelProto(ir_version=self._model.ir_version, opset_import=self._model.opset_import)
        part.graph.name = graph.name
        for node in graph.node:
            if node.output and node.output[0] in wanted:
                part.graph.node.add().CopyFrom(node)
                part.graph.node[-1].input[:] = [_CUT + name if name in given else name for name in node.input]
        read = {name for node in part.graph.node for name in node.input}
        part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
        for name, kind in given.items():
            if _CUT + name in read:
                part.graph.input.append(onnx.helper.make_tensor_value_info(_CUT + name, kind, None))
        part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in nodes)
        return ModelInFolder(self._folder, part.SerializeToString())


def weight_faults(
    captured: CapturedModel, entries: Sequence[LinearEntry], seen: BlockComparison,
    values: Mapping[str, Sequence[Tensor]], noise: NoiseProbe, rescaled: Set[str], transformed: bool,
) -> dict[str, str]:  # fmt: skip
    """What is wrong with the weights of a block's linears, in words, by name; see `faults.fault_of_weight`.

    Args:
        values: deployed ones, by name in the file.
        rescaled: linears whose outputs are off by factors on purpose.
        transformed: the export folded factors into linears. They are told by the values that linears read; where these
            differ by more than factors, there is nothing to compare a weight with.
    """
    factors: dict[str, Tensor] = {}
    for entry in entries:
        if entry.input and entry.input not in factors:
            given = values[entry.input]
            plain = torch.ones(given[0].shape[-1])
            told = _factors(seen.own_inputs[entry.name], given) if transformed else plain
            if told is not None:
                factors[entry.input] = told
    heard = noise.run(
        [entry for entry in entries if entry.input in factors],
        {name: (values[name][0], factor != 0) for name, factor in factors.items()},
    )
    found = {linear.name: linear for linear in linears(seen.block.module.graph)}
    faults = {}
    for entry in entries:
        if entry.name in heard:
            x, y = heard[entry.name].x, heard[entry.name].y
            factor = factors[entry.input]
            linear = found[entry.name]
            weight = captured.load(linear.weight).float()
            if not factor.eq(1).all():  # an output projection is a GB and more, and hardly ever scaled
                weight = weight / torch.where(factor != 0, factor, 1.0)
            want = x @ weight.t()
            if linear.bias:
                want += captured.load(linear.bias).float()
            got = channelwise(want, y) if entry.name in rescaled else y
            faults[entry.name] = fault_of_weight(x, weight, got - want, grid_of(entry.scheme))
    return faults


def _factors(want: Sequence[Tensor], got: Sequence[Tensor]) -> Tensor | None:
    """The factor of each channel of `got`, [K], 0 where none can be told; None where factors do not explain it.

    None can be told of a channel with next to no signal: behind a ReLU that hardly opens the rounding in front decides
    how far it does.
    """
    pairs = [(w.flatten(0, -2), g.flatten(0, -2).float()) for w, g in zip(want, got, strict=True)]
    square = _total(w.square() for w, _ in pairs)
    factor = (_total(w * g for w, g in pairs) / square.clamp_min(1e-30)).float()
    rest = _total((g - w * factor).square() for w, g in pairs)
    whole = _total(g.square() for _, g in pairs)
    if rest.sum() > _UNEXPLAINED * whole.sum():
        return None
    return torch.where(whole > _SIGNAL**2 * whole[whole > 0].median(), factor, 0.0) if whole.any() else factor


def _total(rows: Iterable[Tensor]) -> Tensor:
    """Sums of columns over all batches, float64."""
    return torch.stack([batch.sum(0, dtype=torch.float64) for batch in rows]).sum(0)
