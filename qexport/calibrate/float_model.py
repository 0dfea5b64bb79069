"""The float model in memory: a block at a time, or whole and run step by step, for text that it writes itself."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import psutil
import torch

from ..artifact.cache_names import is_past, is_present, is_state, past_of
from ..capture.blocks import Block
from ..capture.graph import CapturedModel
from ..device import HOST, Placement, computing
from ..graph.edit import attributes, get_tensor, set_tensor
from ..graph.narrow import narrowed_exactly
from ..graph.placement import make_on, move, unload
from .memory import trim

_WAITS_NARROW, _WORTH_IT = 1 << 30, 1 << 16  # bytes of a block in float32, and numbers in a weight
_UNTRIMMED = 1 << 28  # bytes of float32 that came and went


def float_bytes(captured: CapturedModel) -> int:
    """Bytes of all weights in float32, tied ones once."""
    sizes = {n: get_tensor(b.module, n).numel() for b in captured.blocks for n in b.parameters}
    return 4 * sum(sizes.values())


def fits_in_memory(captured: CapturedModel) -> bool:
    """Whether the whole float model takes at most half of the memory that is free now."""
    return float_bytes(captured) <= psutil.virtual_memory().available // 2


def where_whole(captured: CapturedModel) -> Placement | None:
    """Where the whole float model fits into half of the free memory: on its device, else on the host; None: nowhere."""
    size = float_bytes(captured)
    return next((at for at in (captured.placement, HOST) if size <= _free(at.device) // 2), None)


def _free(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def load_block(captured: CapturedModel, block: Block, placement: Placement | None = None) -> None:
    """Load a block's weights and constants to where it is computed; None: the model's placement.

    Weights of a block that is large in float32 wait in 16 bits where these hold them, see `NarrowTensor`.
    """
    names = attributes(block.module.graph)
    waits = 4 * sum(get_tensor(block.module, name).numel() for name in names) > _WAITS_NARROW
    passed = 0
    for name in names:
        tensor = captured.load(name)
        narrow = waits and tensor.dtype == torch.float32 and tensor.numel() >= _WORTH_IT
        set_tensor(block.module, name, narrowed_exactly(tensor) if narrow else tensor)
        passed += tensor.nbytes if narrow else 0
        if passed > _UNTRIMMED:  # what was float32 lies in holes between what stays, where no other fits in
            passed = 0
            trim()
    move(block.module, (placement or captured.placement).device)


@contextmanager
def weights_of(captured: CapturedModel, block: Block, placement: Placement | None = None):
    """A block loaded as by `load_block` inside the `with`.

    Raises:
        InputError: it does not fit into memory, or what is done with it there.
    """
    try:
        with computing(block.name, placement or captured.placement):
            load_block(captured, block, placement)
            yield
    finally:
        unload(block.module)


@contextmanager
def stepping(captured: CapturedModel):
    """Yields step(input_ids [b, s], past | None) -> (last logits [b, V], past).

    All weights stay in memory inside the `with` where they fit, see `where_whole`. Else every step reads the blocks one
    after another, and nothing but one of them and the caches is in memory; the logits are the same.
    """
    placement = where_whole(captured)
    with _a_block_at_a_time(captured) if placement is None else running(captured, placement) as run:

        def step(ids: torch.Tensor, past: dict[str, torch.Tensor] | None):
            logits, past = run(ids, past, 1)
            return logits[:, -1], past

        yield step


@contextmanager
def running(captured: CapturedModel, placement: Placement = HOST):
    """Hold all weights inside the `with`.

    Yields run(input_ids [b, s], past | None, n) -> (logits of the last n positions [b, n, V], past), ids and logits on
    the CPU.
    """
    device = placement.device
    tensors: dict[str, torch.Tensor] = {}
    try:
        with computing("the whole float model", placement):
            for block in captured.blocks:
                for name in block.parameters:
                    if name not in tensors:
                        tensors[name] = captured.load(name).to(device)
                    set_tensor(block.module, name, tensors[name])
                make_on(block.module, device)
            yield lambda ids, past, last: _run(captured, device, ids, past, last, lambda block: nullcontext())
    finally:
        for block in captured.blocks:
            unload(block.module)


@contextmanager
def _a_block_at_a_time(captured: CapturedModel):
    """Yields the same, the weights of one block in memory."""

    @contextmanager
    def there(block: Block) -> Iterator[None]:
        with weights_of(captured, block):
            yield
        trim()

    device = captured.placement.device
    yield lambda ids, past, last: _run(captured, device, ids, past, last, there)


def _run(
    captured: CapturedModel, device: torch.device, ids: torch.Tensor, past: dict[str, torch.Tensor] | None, last: int,
    there: Callable[[Block], AbstractContextManager[None]],
):  # fmt: skip
    """Run all blocks, each inside of the context in which it has its weights."""
    batch, new = ids.shape
    caches = [port for port in captured.inputs if is_past(port.name)]
    if past is None:
        past = {p.name: p.empty(batch).to(device) for p in caches}
    length = next((past[p.name].shape[2] for p in caches if not is_state(p.name)), 0)
    feeds = {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones(batch, length + new, dtype=torch.int64, device=device),
        "position_ids": torch.arange(length, length + new, device=device).expand(batch, new),
        **past,
    }
    values = {port.value: feeds[port.name] for port in captured.inputs}
    read_last = {name: index for index, block in enumerate(captured.blocks) for name in block.inputs}
    handed_out = {port.value for port in captured.outputs}
    with torch.no_grad():
        for index, block in enumerate(captured.blocks):
            if index == len(captured.blocks) - 1:  # the others are not read
                values = {n: v[:, -last:] if n in block.inputs and v.dim() == 3 else v for n, v in values.items()}
            with there(block):
                values.update(zip(block.outputs, block.module(*(values[n] for n in block.inputs)), strict=True))
            for name in [name for name in values if read_last.get(name) == index and name not in handed_out]:
                del values[name]
    results = {port.name: values[port.value] for port in captured.outputs}
    present = {past_of(name): v for name, v in results.items() if is_present(name)}
    return results["logits"][:, -last:].cpu(), present
