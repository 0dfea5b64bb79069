"""What capture hands on: the blocks of a model, its interface and where its weights are."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.fx import Node

from ..artifact.cache_names import TOKEN_IDS
from ..artifact.manifest import Kind
from ..device import HOST, Placement
from ..errors import InputError
from ..graph.views import results_of
from ..models.agreement import ReaderAgreement
from ..models.checkpoint import GivenCodes
from ..models.source import ModelFolder
from ..models.witness import Witness
from .blocks import Block, handed_on


class WeightSource(Protocol):
    """Anything that can produce a named tensor."""

    def load(self, name: str) -> torch.Tensor: ...


# Dimensions of language models are named as in exports of optimum: transformers.js goes by these names.
BATCH = "batch_size"


@dataclass(frozen=True)
class Port:
    """One input or output of the model.

    Attributes:
        name: what the user and the ONNX file call it.
        value: name of the value in the graph.
        dtype: torch dtype.
        dims: an int, or the name of a dynamic dimension, for each axis.
        sizes: of the example that the model was traced with; () of a decoder's.
    """

    name: str
    value: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]
    sizes: tuple[int, ...] = ()

    def empty(self, batch: int) -> torch.Tensor:
        """A value of a batch without anything along the dynamic dimensions: a cache of no tokens."""
        sizes = [size if isinstance(size, int) else batch if size == BATCH else 0 for size in self.dims]
        return torch.zeros(sizes, dtype=self.dtype)


@dataclass(frozen=True)
class Basis:
    """How rows of a value differ from those of the model as it was: their mean is taken off, and they are turned.

    Attributes:
        turn: orthogonal, float64 [d, d]; rows are multiplied by it from the right.
        centred: whether the mean of each row is taken off before.
    """

    turn: torch.Tensor
    centred: bool = False

    def undo(self, changed: torch.Tensor) -> torch.Tensor:
        """Rows [..., d] as they were, but for their mean where it was taken off."""
        return (changed.double() @ self.turn.t()).to(changed.dtype)

    def comparable(self, original: torch.Tensor) -> torch.Tensor:
        """What `undo` gives for rows of the model as it was."""
        return original - original.mean(-1, keepdim=True) if self.centred else original


@dataclass
class CapturedModel:
    """A model as blocks without weights.

    Attributes:
        kind: "decoder" (causal language model with a cache), "encoder" (text to hidden states) or "module".
        constants: tensors of the graph that are computed from the config, not read from the checkpoint.
        settings: sizes that the runtime needs; for decoders layers, heads, head_dim and vocabulary; for encoders and
            modules the dimensions of every input.
        tied: for each weight every other name it goes by.
        witness: who else can say what the model computes; None for a graph that came without its model.
        reader: what comparing the graph with the witness showed; None before `validation.reader.check_reader`.
        basis: by the name of a value that crosses blocks, how a pass over the whole model changed it.
        changed: whether passes over the whole model have run.
        notes: sentences on what a user may not expect of the model's folder.
        left_out: tensors of the checkpoint that the model does not read.
        given: by weight, the codes that the checkpoint holds; the others are float there.
        placement: where its blocks are computed.
    """

    kind: Kind
    blocks: list[Block]
    inputs: list[Port]
    outputs: list[Port]
    weights: WeightSource
    constants: dict[str, torch.Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    folder: ModelFolder | None = None
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    witness: Witness | None = None
    reader: ReaderAgreement | None = None
    basis: dict[str, Basis] = field(default_factory=dict)
    changed: bool = False
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    given: Mapping[str, GivenCodes] = field(default_factory=dict)
    placement: Placement = HOST

    @property
    def reads_text(self) -> bool:
        """Whether it reads token ids and nothing else that text does not say: not embeddings that another part made."""
        return self.kind != "module" and any(port.name == TOKEN_IDS for port in self.inputs)

    @property
    def origin(self) -> ModelFolder:
        """The folder that it was captured from.

        Raises:
            InputError: it was captured from none.
        """
        if self.folder is None:
            raise InputError("was not captured from a folder, and this needs its config and tokenizer", place=self.kind)
        return self.folder

    def copy(self) -> "CapturedModel":
        """The same model once more, to be changed apart from this one; weights that blocks hold are not loaded there.

        Tensors that passes put into blocks are in both.
        """
        return replace(
            self, blocks=[block.copy() for block in self.blocks], inputs=list(self.inputs), outputs=list(self.outputs),
            constants=dict(self.constants), settings=dict(self.settings), tied=dict(self.tied),
            basis=dict(self.basis), notes=list(self.notes), left_out=list(self.left_out),
        )  # fmt: skip

    def output_node(self, output: str) -> tuple[Block, Node] | None:
        """The block and the node that make an output of the model, by its public name; None without such an output."""
        value = next((port.value for port in self.outputs if port.name == output), None)
        for block in self.blocks:
            if value in block.outputs:
                return block, results_of(block.module.graph)[block.outputs.index(value)]
        return None

    def input_node(self, name: str, block: Block) -> Node | None:
        """The placeholder of a block for an input of the model, by its public name; None where it reads none."""
        value = next((port.value for port in self.inputs if port.name == name), None)
        if value not in block.inputs:
            return None
        placeholders = [n for n in block.module.graph.nodes if n.op == "placeholder"]
        return placeholders[block.inputs.index(value)]

    def handed_on(self, block: Block) -> str:
        """Name of the value that a block hands on to the next one, see `blocks.handed_on`."""
        following = self.blocks[[b.name for b in self.blocks].index(block.name) + 1 :]
        return handed_on(block.outputs, following[0].inputs if following else ())

    def load(self, name: str) -> torch.Tensor:
        """A weight or constant of the graph, float32 where it is floating point."""
        return self.constants[name] if name in self.constants else self.weights.load(name)
