"""Which linears of a model that came from a GGUF file have their blocks in the file, and in which order of rows.

Files name tensors otherwise than models, and keep the rows of queries and keys in another order. Neither is known here:
a tensor belongs to the linear whose rows, in some order, are its own bit by bit.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from .coded.gguf_blocks import BLOCKS, METHOD, part_of

_PLAIN = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, eq=False)
class StoredBlocks:
    """Linears that keep the blocks of a file.

    Attributes:
        of: by the name of the weight, its type and its blocks, uint8 [N, bytes of a row], rows in the model's order.
        others: types of the tensors of the file that are blocks and become float.
    """

    of: dict[str, tuple[str, Tensor]]
    others: tuple[str, ...]

    def replace_in(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with blocks in place of weights."""
        blocks = {part_of(name, kind): data for name, (kind, data) in self.of.items()}
        return {name: tensor for name, tensor in state.items() if name not in self.of} | blocks

    @property
    def said(self) -> dict[str, Any]:
        """What a config says of them."""
        kept = sorted({kind for kind, _ in self.of.values()})
        return {"quant_method": METHOD, "blocks": kept, "float": list(self.others)}


def stored_blocks(model: PreTrainedModel, tensors: Iterable[Any]) -> StoredBlocks | None:
    """Find the linears whose blocks can be kept; None where most blocks of the file are of other types.

    Args:
        model: that transformers made of the file, in float32.
        tensors: of gguf's reader.
    """
    if get_checkpoint_conversion_mapping(model.config.model_type):
        return None  # its weights lie under other names in a folder, and transformers reads those as float alone
    linears, found = _by_rows(model), dict[str, tuple[str, Tensor]]()
    lost, kept = Counter[str](), 0
    for tensor in tensors:
        kind = tensor.tensor_type.name
        if kind in _PLAIN or len(tensor.shape) != 2:
            continue
        name = _keep(tensor, kind, linears, found) if kind in BLOCKS else None
        if name is not None:
            kept += int(tensor.n_elements)
        elif kind not in BLOCKS:
            lost[kind] += int(tensor.n_elements)
    return StoredBlocks(found, tuple(sorted(lost))) if kept > lost.total() else None


def _keep(tensor: Any, kind: str, linears: dict, found: dict[str, tuple[str, Tensor]]) -> str | None:
    """Put the blocks of a tensor down as those of its linear; the name of that one's weight, None where it has none."""
    from gguf import dequantize

    values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    sums, order = _rows(values).sort(stable=True)
    same = linears.get(_key(values, sums))
    if not same:
        return None
    name, weight, places = same.pop()
    rows = torch.empty_like(order)
    rows[places] = order
    if not torch.equal(values[rows].view(torch.int32), weight.view(torch.int32)):
        return None
    found[name] = (kind, torch.from_numpy(tensor.data.copy())[rows])
    return name


def _by_rows(model: nn.Module) -> dict[tuple, list[tuple[str, Tensor, Tensor]]]:
    """(name, weight [N, K], places of the rows in the order of their sums) of linears, by what `_key` says of them.

    Those that share their weight with a table of embeddings are left out: what is read by ids stays float.
    """
    shared = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    made: dict[tuple, list[tuple[str, Tensor, Tensor]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in shared:
            weight = module.weight.detach().contiguous()
            sums, places = _rows(weight).sort(stable=True)
            made.setdefault(_key(weight, sums), []).append((f"{path}.weight", weight, places))
    return made


def _key(values: Tensor, sums: Tensor) -> tuple:
    return tuple(values.shape), sums.numpy().tobytes()


def _rows(values: Tensor) -> Tensor:
    """A checksum of the bits of each row of float32 [N, K]: int64 [N], the same in whatever order rows are."""
    factors = torch.randint(1 << 62, (values.shape[1],), generator=torch.Generator().manual_seed(0))
    return torch.cat([(rows.view(torch.int32).long() * factors).sum(1) for rows in values.contiguous().split(1024)])
