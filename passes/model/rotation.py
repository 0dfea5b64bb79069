"""Rotations: of the residual stream, folded into the weights around it (QuaRot's R1, arXiv 2404.00456), and in blocks.

Outliers sit in a few channels of the residual stream. With an orthogonal matrix Q, x Q has the same norms and spreads
them over all channels. A norm without a gain commutes with Q, so once gains are moved into the linears behind them,
tables and linears that write into the stream are multiplied by Q and those that read it by its inverse, and the model
computes what it did. A LayerNorm is an RMSNorm of the stream without its mean, which is taken out of whatever writes.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.fx import Node

from ...capture.blocks import Block
from ...capture.graph import Basis, CapturedModel
from ...errors import PassError
from ...graph.edit import get_tensor, is_call, set_tensor, spec_of
from ...graph.meta import Meta
from ...graph.schema import bind
from ...graph.sites import Linear, norm_bias, norm_gain
from ...quant.hadamard import rotation
from ...recipe.methods import ModelMethod
from ...recipe.registry import method
from ..base import SiteRecord
from .base import ModelPass, ModelResult, Read, change_weights
from .residual import Norm, ResidualStream, residual_stream
from .rotations_within import RotateInputs, RotateKeys, RotateValues

aten = torch.ops.aten


@method("model", "rotation")
class RotationSection(ModelMethod):
    """Rotations by Hadamard matrices that spread the outliers of a few channels over all (QuaRot, arXiv 2404.00456).

    They change no result of the float model. That of the residual stream is for decoders whose stream is read through
    norms and written by linears and embeddings.

    Attributes:
        seed: of the random signs of rows.
        residual: rotate the residual stream, folded into the weights (R1).
        matrix: safetensors file with the matrix for that, "rotation" [d, d], orthogonal; empty for a Hadamard matrix.
            An export is validated where the file lies. `samples/learn_rotation.py` learns one.
        values: rotate the values of every head, folded into the projections before and behind attention (R2).
        keys: rotate queries and keys behind their rotary embedding, when the model runs (R3); for caches in few bits.
            The rotary embedding is outside of the attention operator then.
        inputs: rotate what linears read behind an activation, as a down projection does, when the model runs (R4).
    """

    seed: int = Field(0, ge=0, lt=2**62)
    residual: bool = True
    matrix: str = ""
    values: bool = False
    keys: bool = False
    inputs: bool = False

    def model_passes(self) -> list[ModelPass]:
        passes: list[ModelPass] = [RotateResidual(self.seed, self.matrix)] if self.residual else []
        passes += [RotateValues(self.seed)] if self.values else []
        passes += [RotateKeys(self.seed)] if self.keys else []
        return [*passes, RotateInputs(self.seed)] if self.inputs else passes


@dataclass(frozen=True)
class RotateResidual(ModelPass):
    """Rotate the residual stream of a decoder by a Hadamard matrix with random signs, or by another one.

    Attributes:
        seed: of the signs.
        matrix: file of another one; empty for none.
    """

    seed: int = 0
    matrix: str = ""

    def call(self, captured: CapturedModel) -> ModelResult:
        """Fold the rotation into embeddings, linears and the output projection.

        Raises:
            PassError: something stands between the stream and the linears that a rotation cannot pass.
        """
        stream = residual_stream(captured)
        before = {name for block in captured.blocks for name in block.parameters}
        centred = _centred(stream)
        _check_uses(captured, stream)
        turn = _read_turn(Path(self.matrix), stream.width) if self.matrix else rotation(stream.width, self.seed)
        write = turn - turn.mean(0, keepdim=True) if centred else turn  # the mean of a row taken out first
        made: dict[str, Callable[[Read], Tensor]] = {}
        for name in (*stream.tables, *stream.vectors):
            made[name] = partial(_times, name, write)
        for _, linear in stream.writers:
            made[linear.weight] = partial(_written, linear.weight, write)
            if linear.bias is not None:
                made[linear.bias] = partial(_times, linear.bias, write)
        for block, linear in stream.readers:
            weight = _own_weight(block, linear, made)
            made[weight] = partial(_read_by, linear.weight, None, turn)
        for norm in stream.norms:
            made |= _folded(norm, turn, made)
        added = {name for block in captured.blocks for name in block.parameters} - before
        change_weights(captured, made, added)
        found = [SiteRecord(name, "rotated", {"width": stream.width}) for name in stream.crossing]
        captured.basis |= dict.fromkeys(stream.crossing, Basis(turn, centred))
        return ModelResult(changed=found)


def _read_turn(path: Path, width: int) -> Tensor:
    """An orthogonal matrix from a file, float64 [width, width].

    Raises:
        PassError: there is none in it.
    """
    try:
        found = load_file(path)["rotation"].double()
    except (OSError, KeyError, SafetensorError) as error:
        raise PassError(f"{path} has no matrix named rotation ({type(error).__name__})") from None
    if found.shape != (width, width):
        raise PassError(f"{path} has a matrix {list(found.shape)}, and the residual stream {width} channels")
    off = float((found @ found.t() - torch.eye(width, dtype=torch.float64)).abs().max())
    if not off < 1e-6:
        raise PassError(f"the matrix of {path} is not orthogonal: its product with its transpose is off by {off:.1g}")
    return found


def _centred(stream: ResidualStream) -> bool:
    """Whether the norms take the mean of a row off.

    Raises:
        PassError: some do and some do not, or a linear reads the stream with its mean.
    """
    kinds = {is_call(norm.node, aten.layer_norm.default) for norm in stream.norms}
    if len(kinds) > 1:
        raise PassError("the residual stream is read by norms that take off its mean and by norms that do not")
    if kinds == {True} and stream.readers:
        raise PassError(f"{stream.readers[0][1].name} reads the residual stream with its mean, which norms take off")
    return kinds == {True}


def _check_uses(captured: CapturedModel, stream: ResidualStream) -> None:
    """Refuse tensors that something else reads too, but for a table that is the output projection's weight."""
    uses = Counter(
        node.target for block in captured.blocks for node in block.module.graph.nodes if node.op == "get_attr"
        for _ in node.users
    )  # fmt: skip
    changed: Counter[str] = Counter()
    for _, linear in (*stream.writers, *stream.readers, *(pair for norm in stream.norms for pair in norm.readers)):
        changed.update(name for name in (linear.weight, linear.bias) if name is not None)
    for norm in stream.norms:
        changed.update(name for name in (_gain_of(norm)[0], norm_bias(norm.node)) if name is not None)
    tables = set(stream.tables)
    for name, count in changed.items():
        if name not in tables and uses[name] != count:
            raise PassError(f"{name} is also read by something that is not on the residual stream")
        if name not in tables and count > 1 and not _is_gain(stream, name):
            raise PassError(f"{name} is shared by several linears")


def _is_gain(stream: ResidualStream, name: str) -> bool:
    return any(name in (_gain_of(norm)[0], norm_bias(norm.node)) for norm in stream.norms)


def _gain_of(norm: Norm) -> tuple[str | None, float]:
    """Name of a norm's gain and what is added to it; None without a gain.

    Raises:
        PassError: the gain is computed.
    """
    weight = bind(norm.node).weight
    if weight is None:
        return None, 0.0
    try:
        return norm_gain(norm.node)
    except TypeError:
        raise PassError(f"the gain of {norm.node.name} is not a constant") from None


def _folded(norm: Norm, turn: Tensor, made: dict[str, Callable[[Read], Tensor]]) -> dict[str, Callable[[Read], Tensor]]:
    """Move a norm's gain and bias into its readers, and turn what they read back; a LayerNorm becomes an RMSNorm."""
    (gain, offset), bias = _gain_of(norm), norm_bias(norm.node)
    found: dict[str, Callable[[Read], Tensor]] = {}
    for block, linear in norm.readers:
        weight = _own_weight(block, linear, made | found)
        scale = None if gain is None else partial(_plus, gain, offset)
        found[weight] = partial(_read_by, linear.weight, scale, turn)
        if bias is not None:
            own = linear.bias or _new_bias(block, linear)
            found[own] = partial(_shifted, linear.bias, linear.weight, bias)
    if gain is not None:
        found[gain] = lambda read: torch.full_like(read(gain), 1.0 - offset)
    if is_call(norm.node, aten.layer_norm.default):
        call = bind(norm.node)
        norm.node.target = aten.rms_norm.default
        norm.node.args, norm.node.kwargs = (call.input, call.normalized_shape, call.weight, call.eps), {}
        norm.block.module.recompile()
    return found


def _own_weight(block: Block, linear: Linear, made: Collection[str]) -> str:
    """The name of a reader's weight; a new one where it is a table too, which turns another way."""
    if linear.weight not in made:
        return linear.weight
    name = f"{linear.name}.weight"
    if name == linear.weight or name in made:
        name = f"{linear.name}.read_weight"
    _add(block, linear.node, name, get_tensor(block.module, linear.weight), place=1)
    return name


def _new_bias(block: Block, linear: Linear) -> str:
    name = f"{linear.name}.bias"
    like = get_tensor(block.module, linear.weight)
    _add(block, linear.node, name, like.new_empty(linear.shape[0], device="meta"), place=2)
    return name


def _add(block: Block, call: Node, name: str, like: Tensor, place: int) -> None:
    """Let a call read a new tensor of a block, which has no data yet."""
    graph = block.module.graph
    set_tensor(block.module, name, torch.empty(like.shape, dtype=like.dtype, device="meta"))
    with graph.inserting_before(call):
        node = graph.get_attr(name)
    spec, path = spec_of(get_tensor(block.module, name)), call.meta.get(Meta.MODULE_PATH, "")
    node.meta = {Meta.SPEC: spec, Meta.MODULE_PATH: path}
    args = list(call.args) + [None] * (place + 1 - len(call.args))
    args[place] = node
    call.args = tuple(args)
    block.parameters.append(name)
    graph.eliminate_dead_code()
    block.module.recompile()


def _times(name: str, turn: Tensor, read: Read) -> Tensor:
    """Rows times a matrix."""
    return _product(read(name), turn)


def _written(name: str, turn: Tensor, read: Read) -> Tensor:
    """The weight [d, K] of a linear whose results are multiplied by `turn`."""
    return _product(read(name).t(), turn).t().contiguous()


def _read_by(name: str, gain: Callable[[Read], Tensor] | None, turn: Tensor, read: Read) -> Tensor:
    """The weight [N, d] of a linear that reads rows turned, and without their gain."""
    weight = read(name)
    return _product(weight if gain is None else weight * gain(read), turn)


def _shifted(own: str | None, weight: str, shift: str, read: Read) -> Tensor:
    """The bias of a linear that takes over the bias of the norm before it."""
    moved = read(weight).double() @ read(shift).double()
    return (moved if own is None else moved + read(own)).float()


def _plus(name: str, offset: float, read: Read) -> Tensor:
    return read(name) + offset


def _product(rows: Tensor, turn: Tensor) -> Tensor:
    """rows [n, d] times [d, d], in float64 a part at a time: what is exact in the paper is exact to float32 here."""
    if rows.dim() == 1:
        return (rows.double() @ turn).float()
    step = max(1, (1 << 24) // rows.shape[1])
    return torch.cat([(part.double() @ turn).float() for part in rows.split(step)])
