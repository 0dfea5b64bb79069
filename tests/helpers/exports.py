"""An export kept together with the graph it was lowered from, so that both can be run on the same inputs."""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from helpers.runners import Runner, block_runner
from qexport.api import exporting
from qexport.artifact.manifest import CPU, MODEL_FILE, Manifest
from qexport.capture.blocks import Block
from qexport.capture.graph import CapturedModel
from qexport.graph.edit import attributes, get_tensor, set_tensor
from qexport.lower.emitter import ONNX_DTYPE
from qexport.recipe.recipe import Recipe
from qexport.runtime.session import open_session
from qexport.validation.running import run_session


@dataclass
class Exported:
    """What `qexport.export` wrote, and what it wrote it from.

    Attributes:
        blocks: the rewritten blocks with their tensors: the graph that the file claims to be.
        captured: the float model, weights not loaded.
        prompts: the same for prompts, where the file tells them from steps; else the same blocks.
    """

    folder: Path
    manifest: Manifest
    blocks: list[Block]
    captured: CapturedModel
    prompts: list[Block]

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


def session_runner(session: ort.InferenceSession) -> Runner:
    names = [value.name for value in session.get_outputs()]
    return lambda feeds: run_session(session, feeds, names)


def export(captured: CapturedModel, recipe: Recipe, target: str, out: Path, **options) -> Exported:
    """`qexport.export` of a graph captured already.

    Args:
        captured: a copy of its own.
    """
    original, kept, prompts = copy.deepcopy(captured), [], []
    lower = exporting.lower

    def spy(graph, finished, target):
        lowered = lower(graph, finished, target)
        for item in finished:
            twin = dataclasses.replace(item, block=copy.deepcopy(item.block))
            twin.fill()
            kept.append(twin.block)
            prompt = copy.deepcopy(item.prompt)
            for name in attributes(prompt.graph) if prompt else ():
                own = get_tensor(prompt, name)
                set_tensor(prompt, name, item.read_prompt(name).to(own.dtype))
            prompts.append(dataclasses.replace(item.block, module=prompt) if prompt else twin.block)
        return lowered

    with patch.object(exporting, "lower", spy):
        result = exporting.export(captured, recipe, out_dir=out, target=target, **options)
    return Exported(result.folder, result.manifest, kept, original, prompts)
