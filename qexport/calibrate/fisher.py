"""How much an error in a value costs in KL, found by one pass backward through the float model, block by block.

KL between the float model's next-token distributions and slightly moved ones is half the square of the movement in the
Fisher metric: KL = 1/2 E (g . e)^2, where e is the error of a value and g the gradient of the log-likelihood of tokens
drawn from the model's own distribution with respect to that value. Errors of rounding are as good as independent from
one output channel to the next, so the squares of g are enough; of those the rows' and the columns' sums are kept, and
their product stands for the matrix.

One block's weights are in memory; what blocks read lies in a temporary folder between the way there and the way back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ..artifact.scratch import scratch_folder
from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..device import CPU
from ..errors import NumericsError
from ..graph.edit import is_call
from ..graph.sites import Linear, linears
from ..graph.views import CachedAttention, size_at
from ..progress import StageProgress, no_stage_progress
from .block_activations import Feeds, stream_of
from .float_model import weights_of

_SEED = 20230209


@dataclass(frozen=True)
class Importance:
    """Mean squared gradients of a value, as a product.

    Attributes:
        rows: float32 [rows], over channels summed; columns: float32 [channels], shares that sum to 1.
    """

    rows: Tensor
    columns: Tensor

    def to(self, device: torch.device) -> "Importance":
        """The same on a device."""
        return Importance(self.rows.to(device), self.columns.to(device))

    def kl(self, error: Tensor) -> float:
        """What an error [rows, channels] adds to the mean KL of a token, in nats; rows are those it was found on."""
        # A row that the model does not listen to may hold an error of any size, or no number at all.
        squares = error.float().square().nan_to_num(posinf=torch.finfo(torch.float32).max) @ self.columns
        return float((squares.double() * self.rows.double()).mean() / 2)

    def of_features(self, inputs: Tensor) -> Tensor:
        """How much the squared error of a weight counts by the input feature that it multiplies, float32 [in_features].

        Args:
            inputs: float32 [rows, in_features], what the linear reads.
        """
        return self.rows @ inputs.square() / (2 * len(self.rows))

    def kl_of_weight(self, features: Tensor, difference: Tensor) -> float:
        """What a rounded weight adds, whose errors are as good as independent of each other.

        Args:
            features: see `of_features`.
            difference: float32 [channels, in_features], rounded weight minus float weight.
        """
        return float((difference.square() @ features).double() @ self.columns.double())


@dataclass(frozen=True)
class KeptRows:
    """Keys or values that an attention puts into its cache.

    Attributes:
        rows: float32 [rows, kv_heads * head_dim]; heads: how many.
        importance: of them.
    """

    rows: Tensor
    heads: int
    importance: Importance

    @property
    def by_head(self) -> Tensor:
        """The same as attention has them: [1, kv_heads, rows, head_dim]."""
        return self.rows.unflatten(1, (self.heads, -1)).transpose(0, 1)[None]

    def kl(self, rounded: Tensor) -> float:
        """What it adds to the mean KL of a token, in nats, to keep other numbers [1, kv_heads, rows, head_dim]."""
        return self.importance.kl(_rows_of_heads(rounded) - self.rows)


@dataclass(frozen=True)
class BlockGradients:
    """A block on the way back, its weights loaded.

    Attributes:
        linears: (linear, input float32 [rows, in_features], importance of its result) for every linear.
        output: importance of what the block hands on, which is its result number `handed`; None for the last block.
        inputs: of the block, for each batch.
        kept: keys and values that its attentions cache, where that was asked for.
    """

    block: Block
    inputs: list[tuple[Tensor, ...]]
    linears: list[tuple[Linear, Tensor, Importance]]
    output: Importance | None
    handed: int
    kept: list[KeptRows] = field(default_factory=list)


@dataclass
class Carried:
    """Gradients on their way from one part of a model to the one whose results it reads.

    Attributes:
        names: public names of the values that pass from part to part.
        tokens: whose likelihood they are of, over all batches.
        counted: for each batch, which rows of the logits are of these tokens, bool [batch, sequence]; None for all.
        batches: the gradients by name for each batch, once the part that reads them was run.
    """

    names: frozenset[str]
    tokens: int
    counted: Sequence[Tensor] | None = None
    batches: list[dict[str, Tensor]] = field(default_factory=list)


def felt(
    captured: CapturedModel, feeds: Sequence[Feeds], progress: StageProgress = no_stage_progress,
    carried: Carried | None = None, *, caches: bool = False,
) -> Iterator[BlockGradients]:  # fmt: skip
    """Every block, last first, with the importance of the values in it.

    Args:
        captured: what makes logits, or a part in front of that.
        feeds: its inputs by public name, one dict for each batch.
        carried: of a part in front the gradients of what it makes; of one that reads what others make it gets those of
            what that reads, once all blocks are through. Importance is by token in both, however many rows a part has.
        caches: whether keys and values are wanted too.
    """
    with scratch_folder() as folder:
        places = [folder / f"{index}.safetensors" for index in range(len(captured.blocks))]
        _there(captured, feeds, places, progress)
        yield from _back(captured, len(feeds), places, progress, carried, caches)


def _there(captured: CapturedModel, feeds: Sequence[Feeds], places: Sequence[Path], progress: StageProgress) -> None:
    stream = stream_of(captured, feeds)
    for index, (block, place) in enumerate(zip(captured.blocks, places, strict=True)):
        progress(block.name, index, 2 * len(places))
        given = {
            f"{batch} {name}": value.to(CPU).contiguous().clone() if isinstance(value, Tensor) else torch.tensor(value)
            for batch in range(len(feeds))
            for name, value in zip(block.inputs, stream.inputs(block, batch), strict=True)
        }
        save_file(given, place)
        if index < len(places) - 1:
            with weights_of(captured, block):
                stream.advance(block, index)


def _back(
    captured: CapturedModel, count: int, places: Sequence[Path], progress: StageProgress, carried: Carried | None,
    caches: bool,
) -> Iterator[BlockGradients]:  # fmt: skip
    names = carried.names if carried else frozenset()
    read = {port.value: port.name for port in captured.inputs if port.name in names}
    made = {name for block in captured.blocks for name in block.outputs} | read.keys()
    called = {port.name: port.value for port in captured.outputs}
    logits = called.get("logits", "")
    gradients: list[dict[str, Tensor]] = [{} for _ in range(count)]
    if carried and not logits:
        gradients = [{called[name]: gradient for name, gradient in batch.items()} for batch in carried.batches]
    draws = torch.Generator().manual_seed(_SEED)
    for index in reversed(range(len(places))):
        block = captured.blocks[index]
        progress(block.name, 2 * len(places) - 1 - index, 2 * len(places))
        given = load_file(places[index])
        places[index].unlink()
        sites = linears(block.module.graph)
        kept = _kept(block.module) if caches else []
        sums, handed = _Sums(len(sites) + len(kept), carried.tokens if carried else 0), captured.handed_on(block)
        device = captured.placement.device
        inputs = [
            tuple(_read(given.pop(f"{batch} {name}"), device) for name in block.inputs) for batch in range(count)
        ]
        with weights_of(captured, block):
            for batch in range(count):
                counted = carried.counted[batch] if carried and carried.counted else None
                sums.add(
                    _one(block, sites, kept, inputs[batch], made, logits, gradients[batch], draws, handed, counted)
                )
            yield BlockGradients(
                block, inputs, sums.linears(sites), sums.output(), block.outputs.index(handed), sums.kept(kept)
            )
    if carried and read:
        carried.batches = [{read[n]: g.to(CPU) for n, g in batch.items() if n in read} for batch in gradients]
    progress("", 2 * len(places), 2 * len(places))


def _read(value: Tensor, device: torch.device) -> Any:
    """A value of a block on a device; a size that passes between blocks is a number again."""
    return value.to(device) if value.dim() or value.is_floating_point() else int(value)


def _one(
    block: Block, sites: Sequence[Linear], kept: Sequence[Node], inputs: Sequence[Any], made: set[str], logits: str,
    gradients: dict[str, Tensor], draws: torch.Generator, handed: str, counted: Tensor | None,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:  # fmt: skip
    """One batch through one block and back: (input, gradient of the result) of each linear, then each of the keys and
    values that are kept with its gradient, and the gradient of the output.

    Args:
        made: values that blocks or parts in front make: only these have gradients to pass on.
        gradients: those of values that later blocks read, by name; gets those of what this block reads.
        handed: name of the value whose gradient is wanted too.
        counted: see `Carried`.
    """
    inputs = [
        value.detach().requires_grad_(name in made and value.is_floating_point())
        if isinstance(value, Tensor)
        else value
        for name, value in zip(block.inputs, inputs, strict=True)
    ]
    wanted = {*(linear.node for linear in sites), *kept}
    watch = _GradientInterpreter(block.module, wanted, {linear.input for linear in sites})
    results = dict(zip(block.outputs, watch.run(*inputs), strict=True))
    if logits in results:
        drawn = _drawn(results[logits].detach(), draws)
        gradients[logits] = drawn if counted is None else drawn * counted.to(drawn.device)[..., None]
    known = {name: gradients.pop(name) for name in results if name in gradients}
    ends = [name for name in known if _learns(results[name])]
    starts = [watch.seen[node] for node in (*(linear.node for linear in sites), *kept)]
    names = [name for name, value in zip(block.inputs, inputs, strict=True) if _learns(value)]
    starts += [value for value in inputs if _learns(value)]
    found: Sequence[Tensor | None] = [None] * len(starts)
    if ends and starts:
        found = torch.autograd.grad(
            [results[name] for name in ends], starts, [known[name] for name in ends], allow_unused=True
        )
    for name, gradient in zip(names, found[len(sites) + len(kept) :], strict=True):
        if gradient is not None:
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    pairs = []
    for linear, gradient in zip(sites, found, strict=False):
        x = watch.seen[linear.input].detach()
        gradient = torch.zeros_like(watch.seen[linear.node]) if gradient is None else gradient
        pairs.append((x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])))
    for node, gradient in zip(kept, found[len(sites) :], strict=False):
        x = watch.seen[node].detach()
        pairs.append((_rows_of_heads(x), _rows_of_heads(torch.zeros_like(x) if gradient is None else gradient)))
    return pairs, None if logits in results else known.get(handed)


def _kept(module: GraphModule) -> list[Node]:
    """The keys and values that attentions of a block put into their caches, each once."""
    nodes = (node for node in module.graph.nodes if is_call(node, torch.ops.qexport.cached_attention.default))
    pairs = (CachedAttention.of(node) for node in nodes)
    found = dict.fromkeys(value for pair in pairs for value in (pair.key, pair.value))
    return [value for value in found if value.op != "placeholder"]


def _rows_of_heads(x: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim] as [batch * tokens, heads * head_dim]."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def _learns(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _drawn(logits: Tensor, draws: torch.Generator) -> Tensor:
    """Gradient of the negative log-likelihood of a token drawn for every row, with respect to the logits."""
    likely = torch.softmax(logits.float(), -1)
    rows = likely.flatten(0, -2)
    picked = torch.multinomial(rows.to(CPU), 1, generator=draws).to(rows.device)  # the same tokens on every device
    rows.scatter_add_(1, picked, rows.new_full(picked.shape, -1.0))
    return likely


class _GradientInterpreter(Interpreter):
    """Keeps values of nodes; results of linears can be differentiated for."""

    def __init__(self, module: GraphModule, results: set[Node], inputs: set[Node]):
        super().__init__(module)
        self._results, self._wanted = results, results | inputs
        self.seen: dict[Node, Tensor] = {}

    def run_node(self, node: Node) -> Any:
        value = super().run_node(node)
        if node in self._results and not value.requires_grad:
            value.requires_grad_()
        if node in self._wanted:
            self.seen[node] = value
        return value


class _Sums:
    """What is kept of gradients over batches.

    Args:
        count: of linears and of what is kept; tokens: that rows belong to, 0 where each has one.
    """

    def __init__(self, count: int, tokens: int):
        self._tokens = tokens
        self._inputs: list[list[Tensor]] = [[] for _ in range(count)]
        self._rows: list[list[Tensor]] = [[] for _ in range(count + 1)]
        self._columns: list[Tensor | None] = [None] * (count + 1)

    def add(self, found: tuple[list[tuple[Tensor, Tensor]], Tensor | None]) -> None:
        pairs, handed = found
        for place, (x, gradient) in enumerate(pairs):
            self._inputs[place].append(x)
            self._note(place, gradient)
        if handed is not None:
            self._note(len(self._inputs), handed.reshape(-1, handed.shape[-1]))

    def linears(self, sites: Sequence[Linear]) -> list[tuple[Linear, Tensor, Importance]]:
        return [
            (linear, torch.cat(x), self._importance(place))
            for place, (linear, x) in enumerate(zip(sites, self._inputs, strict=False))
        ]

    def kept(self, nodes: Sequence[Node]) -> list[KeptRows]:
        places = range(len(self._inputs) - len(nodes), len(self._inputs))
        return [
            KeptRows(torch.cat(self._inputs[place]), size_at(node, 1), self._importance(place))
            for place, node in zip(places, nodes, strict=True)
        ]

    def output(self) -> Importance | None:
        return self._importance(len(self._inputs)) if self._rows[-1] else None

    def _note(self, place: int, gradient: Tensor) -> None:
        squares = gradient.square()
        self._rows[place].append(squares.sum(1))
        columns, before = squares.sum(0), self._columns[place]
        self._columns[place] = columns if before is None else before + columns

    def _importance(self, place: int) -> Importance:
        if (columns := self._columns[place]) is None:
            raise NumericsError("no gradient reached a value whose errors are to be priced")
        rows = torch.cat(self._rows[place])
        by_token = len(rows) / self._tokens if self._tokens else 1.0
        return Importance(rows * by_token, columns / columns.sum().clamp_min(1e-30))
