"""An export kept together with the graph it was lowered from, so that both can be run on the same inputs."""

from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from helpers.runners import Runner, block_runner
from qexport.api import exporting
from qexport.api.stages import lowering, packaging
from qexport.api.stages.capturing import capture_model
from qexport.artifact.manifest import CPU, MODEL_FILE, Manifest
from qexport.capture.blocks import Block
from qexport.capture.graph import CapturedModel
from qexport.graph.edit import copy_of, tensors_of
from qexport.lower.emitter import ONNX_DTYPE
from qexport.lower.lowered_block import LoweredBlock
from qexport.quant.narrowing import narrowed
from qexport.recipe.recipe import Recipe
from qexport.runtime.session import open_session
from qexport.validation.reader import check_reader
from qexport.validation.running import run_session


@dataclass
class Exported:
    """What `qexport.export` wrote, and what it wrote it from.

    Attributes:
        blocks: the rewritten blocks with their tensors: the graph that the file claims to be.
        captured: the float model, weights not loaded.
        prompts: the same for prompts, where the file tells them from steps; else the same blocks.
        lowered: the model that the blocks were lowered from last: its inputs and outputs are those of the file.
    """

    folder: Path
    manifest: Manifest
    blocks: list[Block]
    captured: CapturedModel
    prompts: list[Block]
    lowered: CapturedModel

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.manifest.dtype)

    def products(self) -> dict[str, str]:
        """Kernel of every product of the manifest, by the name of its node: fewer than linears, which share some."""
        entries = self.manifest.linears
        return {e.node: e.kernel for e in entries} | dict(part for e in entries for part in e.parts)

    def in_pytorch(self) -> Runner:
        return block_runner(self.blocks, self.captured.inputs, self.captured.outputs)

    def prompts_in_pytorch(self) -> Runner:
        return block_runner(self.prompts, self.captured.inputs, self.captured.outputs)

    def in_onnxruntime(self) -> Runner:
        """The file on the CPU provider, with the session entries of its manifest."""
        return session_runner(open_session(self.folder, self.manifest, threads=1, provider=CPU))

    def in_onnxruntime_with_blocks(self) -> Runner:
        """The same, its results holding what every block hands on besides, by value name."""
        model = onnx.load(self.folder / MODEL_FILE, load_external_data=False)
        kind = TensorProto.DataType.Value(ONNX_DTYPE[self.dtype].name)
        for block in self.manifest.blocks:
            if block.output not in {value.name for value in model.graph.output}:
                model.graph.output.append(helper.make_tensor_value_info(block.output, kind, None))
        path = self.folder / "with_blocks.onnx"
        onnx.save(model, path)
        return session_runner(open_session(path, self.manifest, threads=1, provider=CPU))


def capture(folder: Path) -> CapturedModel:
    """The graph of a model's folder, compared with the model here and not in every export of it."""
    captured = capture_model(folder)
    check_reader(captured)
    return captured


def session_runner(session: ort.InferenceSession) -> Runner:
    names = [value.name for value in session.get_outputs()]
    return lambda feeds: run_session(session, feeds, names)


def export(captured: CapturedModel, recipe: Recipe, target: str, out: Path, **options) -> Exported:
    """`qexport.export` of a graph captured already, without the first run: whoever asks runs the file themselves."""
    kept, prompts, models = [], [], []
    lower_blocks = lowering.lower_blocks

    def spy(graph, finished, target):
        lowered = lower_blocks(graph, finished, target)
        models.append(graph)
        for block in lowered.graphs:
            kept.append(filled(block))
            prompts.append(filled(block.prompt) if block.prompt else kept[-1])
        return lowered

    not_run = patch.object(packaging, "run_once", lambda *_: "not run: a test does")
    with patch.object(lowering, "lower_blocks", spy), not_run:
        result = exporting.export(captured, recipe, out_dir=out, target=target, **options)
    return Exported(result.folder, result.manifest, kept, captured, prompts, models[-1])


def filled(lowered: LoweredBlock) -> Block:
    """A block as it was written, with its tensors."""
    shown = tensors_of(lowered.module)
    tensors = {name: narrowed(lowered.read(name), tensor.dtype, name) for name, tensor in shown.items()}
    return Block(lowered.name, copy_of(lowered.module, tensors), list(lowered.inputs), list(lowered.outputs))
