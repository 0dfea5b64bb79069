"""LoRA adapters in the files of PEFT, under the names that it gives to tensors."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def save_adapter(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    """An adapter of these tensors, named as in the base; config: of what PEFT writes down."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    save_file({f"base_model.model.{name}": t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
    return folder


def low_rank(module: str, n: int, k: int, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """A and B of a linear, both of order 1 / 10."""
    random = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": 0.1 * torch.randn(rank, k, generator=random),
        f"{module}.lora_B.weight": 0.1 * torch.randn(n, rank, generator=random),
    }


WEIGHTS = "adapter_model.safetensors"
