"""Whether the captured float graph computes what a witness computes that reads the model itself."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import psutil
import torch
from torch import Tensor

from ..artifact.cache_names import is_past, present_of
from ..calibrate.float_model import float_bytes, weights_of
from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..capture.weight_views import WeightView, WeightViews
from ..device import HOST
from ..errors import CaptureError
from ..graph.edit import get_tensor
from ..models.agreement import ReaderAgreement, difference, explained
from ..models.witness import Absent, Outline, Testimony
from ..passes.model.base import ChangedWeights

_REMEDY = "One of the two readings is wrong: please report it with the model's name"
# Decisions that a difference of one bit turns.
_TURNED = 0.01  # of an output of integers or truth values, the share that such differences may turn
_DECISIONS = ("topk", "sort", "argsort", "argmax", "argmin", "round", "expert_shares", "highest")


def check_reader(captured: CapturedModel) -> ReaderAgreement:
    """Run the captured graph beside its witness; keeps the result as `captured.reader`, and does it once.

    One block's weights are in memory at a time, beside the witness's model, both on the CPU.

    Raises:
        CaptureError: they differ by more than rounding, or the graph cannot run what the witness ran.
    """
    if captured.reader is None:
        captured.reader = _compared(captured)
    return captured.reader


def _compared(captured: CapturedModel) -> ReaderAgreement:
    if captured.witness is None:
        return ReaderAgreement(why_not="it was captured from something else than a folder or a module")
    outline = Outline(
        tuple(b.name for b in captured.blocks), tuple(p.name for p in captured.inputs),
        tuple(p.name for p in captured.outputs), float_bytes(captured), psutil.virtual_memory().available // 2,
    )  # fmt: skip
    try:
        return _beside(captured, captured.witness.testify(outline))
    except Absent as reason:
        return ReaderAgreement(why_not=str(reason))


def _beside(captured: CapturedModel, said: Testimony) -> ReaderAgreement:
    worst, blocks, compared = 0.0, _kept(captured, said), 0
    chooses = any(_decides(block) for block in blocks)
    bound = explained(said.eps)
    results: dict[str, Tensor] = {}
    for number, call in enumerate(said.calls):
        feeds = dict(call.feeds) | _past(captured, call.feeds, results)
        values, weights = _run(captured, blocks, feeds, said, first=number == 0)
        results = {port.name: values[port.value] for port in captured.outputs if port.value in values}
        compared = compared or weights
        pairs = {name: (want, results[name]) for name, want in call.outputs.items() if name in results}
        if not pairs:
            return ReaderAgreement(why_not="no output of it goes by the same name in both")
        for name, pair in pairs.items():
            exact = not pair[0].is_floating_point()
            found, most = (_unequal(*pair), _TURNED) if exact else (difference([pair], chooses), bound)
            if not found <= most:
                raise _differs(captured, blocks, said, values, call.states, name, found, most, chooses)
            worst = max(worst, found)
    what = "the whole model" if said.kept is None else f"layers {_numbers(said.kept)} as a model of their own"
    return ReaderAgreement(said.name, f"{what}, {said.described()}", worst, bound, compared)


def _unequal(want: Tensor, got: Tensor) -> float:
    """The share of integers or truth values that differ."""
    if want.shape != got.shape:
        return float("inf")
    return float((want != got).double().mean()) if want.numel() else 0.0


def _kept(captured: CapturedModel, said: Testimony) -> list[Block]:
    """The blocks that take part."""
    if said.kept is None:
        return list(captured.blocks)
    container = said.kept[0].rpartition(".")[0] + "."
    return [b for b in captured.blocks if b.name in said.kept or not b.name.startswith(container)]


def _numbers(names: Sequence[str]) -> str:
    numbers = [name.rpartition(".")[2] for name in names]
    return f"{', '.join(numbers[:-1])} and {numbers[-1]}"


def _past(captured: CapturedModel, feeds: Mapping[str, Tensor], results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the call before left in the cache; nothing for the first."""
    rows = len(next(iter(feeds.values())))
    past = {}
    for port in captured.inputs:
        if is_past(port.name):
            made = results.get(present_of(port.name))
            past[port.name] = port.empty(rows) if made is None else made
    return past


def _run(
    captured: CapturedModel, blocks: Sequence[Block], feeds: Mapping[str, Tensor], said: Testimony, *, first: bool
) -> tuple[dict[str, Tensor], int]:
    """All values of one call, and how many weights were compared, which they are in the first one."""
    values = {port.value: feeds[port.name] for port in captured.inputs if port.name in feeds}
    order, weights, stream = list(captured.blocks), 0, ""
    for block in blocks:
        before = order[order.index(block) - 1] if order.index(block) else None
        if before is not None and before not in blocks:  # the last block that ran takes the place of those left out
            values[captured.handed_on(before)] = values[stream]
        if absent := [name for name in block.inputs if name not in values]:
            raise Absent(f"it is too large for the memory, and {block.name} reads {absent[0]}, of layers left out")
        with weights_of(captured, block, HOST):
            weights += _same_weights(captured, block, said) if first else 0
            try:
                with torch.no_grad():
                    made = block.module(*(values[name] for name in block.inputs))
            except (RuntimeError, IndexError, ValueError) as error:
                shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in feeds.items() if not n.startswith("past_"))
                raise CaptureError(
                    f"the captured graph cannot run what {said.name} runs ({shapes}): {str(error).splitlines()[0]}",
                    place=block.name, remedy=_REMEDY,
                ) from error  # fmt: skip
        values.update(zip(block.outputs, made, strict=True))
        stream = captured.handed_on(block) if block.outputs else stream
    return values, weights


def _same_weights(captured: CapturedModel, block: Block, said: Testimony) -> int:
    """How many weights of a block, loaded, the witness knows by their names; all of them are equal."""
    changed = captured.weights if isinstance(captured.weights, ChangedWeights) else None
    read = captured.weights if changed is None else changed.source
    table = read.table if isinstance(read, WeightViews) else {}
    known = 0
    for name in block.parameters:
        if changed is not None and name in changed.added:
            continue
        piece = table.get(name, WeightView(name))
        row = None if piece.stacked else piece.index
        if name in captured.constants or (whole := said.weight(piece.source, row)) is None:
            continue
        own = changed is not None and name in changed.made  # which is compared as it was read
        want = (piece if piece.stacked else replace(piece, index=None)).of(whole).float()
        got = (read.load(name) if own else get_tensor(block.module, name)).float()
        known += 1
        if want.shape == got.shape and torch.equal(want, got):
            continue
        off = difference([(want.flatten()[None], got.flatten()[None])], False)
        if not off <= explained(said.eps):
            raise CaptureError(
                f"the weight that was read differs from that of {said.name} by {_parts(off)} of its magnitude",
                place=name, remedy=_REMEDY,
            )  # fmt: skip
    return known


def _differs(captured, blocks, said, values, states, output, found, bound, chooses) -> CaptureError:
    """Names the first block whose result differs too, where the witness shows those."""
    place, what = f"output {output}", "it"
    for block in blocks:
        want, got = states.get(block.name), values.get(captured.handed_on(block)) if block.outputs else None
        if want is None or got is None or want.shape != got.shape:
            continue
        if (basis := captured.basis.get(captured.handed_on(block))) is not None:
            want, got = basis.comparable(want), basis.undo(got)
        off = difference([(want, got)], chooses)
        if not off <= bound:
            place, what = block.name, f"its result differs by {_parts(off)}, and {output}"
            break
    return CaptureError(
        f"{what} differs from that of {said.name} by {_parts(found)} of its spread, and rounding explains {bound:.0e}",
        place=place, remedy=_REMEDY,
    )  # fmt: skip


def _parts(value: float) -> str:
    return f"{value:.2g}"


def _decides(block: Block) -> bool:
    """Whether a block makes decisions that a difference of one bit turns."""
    return any(
        node.op == "call_function" and str(getattr(node.target, "name", lambda: "")()).split("::")[-1].split(".")[0]
        in _DECISIONS
        for node in block.module.graph.nodes
    )  # fmt: skip
