"""A format of checkpoints from outside of the package: this file is all there is of it, from its config to its codes.

A linear is "levels", int8 [K, N], times one "step" for all.
"""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

import qexport
from helpers.random_decoders import save_model
from qexport.models.coded import CodedCheckpoint, CodedWeight, Given, coded_checkpoint
from qexport.models.coded.base import beside, expect, forget, siblings
from qexport.quant.formats import QuantizedWeight, Scheme


@dataclass(frozen=True)
class Levels(CodedCheckpoint):
    title = "Levels"

    @classmethod
    def match(cls, said):
        return cls() if said.get("quant_method") == "levels" else None

    @property
    def described(self):
        return "Levels, 8 bits"

    def find(self, tensors, read):
        return [
            LevelsWeight(
                f"{path}.weight", (tensors[name].shape[1], tensors[name].shape[0]),
                (name, expect(tensors, f"{path}.step", (1,)), *beside(tensors, path, ("comment",))),
                Scheme.parse("w8a16_pc"), "as stored", "F32",
            )
            for path, name in siblings(tensors, ".levels")
        ]  # fmt: skip


class LevelsWeight(CodedWeight):
    def decode(self, read):
        levels, step = read(self.parts[0]), read(self.parts[1])
        scale = step.expand(self.shape[0], 1).contiguous()
        return Given(QuantizedWeight(levels.t().contiguous(), scale, None, self.scheme.weight))

    def formula(self, read):
        return (read(self.parts[0]).double() * float(read(self.parts[1]))).t()


@pytest.fixture(scope="module", autouse=True)
def registered():
    coded_checkpoint(Levels)
    yield
    forget(Levels)


def test_it_is_inspected_exported_and_validated(tmp_path, run):
    folder = save_model("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    w = tensors.pop(f"{name}.weight")
    step = w.abs().amax().reshape(1) / 127
    tensors |= {f"{name}.levels": (w / step).round().to(torch.int8).t().contiguous(), f"{name}.step": step}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "levels"}}
    (folder / "config.json").write_text(json.dumps(config))

    code, out, _ = run("inspect", folder)
    assert code == 0 and "The checkpoint holds codes (Levels, 8 bits): 1 of 15 linears keep them" in out
    result = qexport.export(folder, out_dir=tmp_path / "out")
    assert [entry.name for entry in result.manifest.linears] == [name]
    assert "weights by the formula of Levels" in result.reference.witness
    report = qexport.validate(result.folder, folder, windows=1, window=32, greedy=0)
    assert report.logits.kl_mean < 1e-4
