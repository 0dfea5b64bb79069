"""Small random models of real families, saved as folders that a user could have downloaded."""

import copy
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.breadth import quick

LISTS = yaml.safe_load((Path(__file__).parents[2] / "samples" / "families.yaml").read_text())
FAMILIES = tuple(LISTS["families"])
BREADTH = tuple(LISTS["breadth"])
REFUSED = tuple(LISTS["refused"])
VOCAB, HIDDEN = LISTS["sizes"]["vocab_size"], LISTS["sizes"]["hidden_size"]

# Of BREADTH one for every thing that capture or lowering does for such models alone.
QUICK = (
    "bloom",
    "falcon",
    "gptj",
    "longrope",
    "cohere",
    "diffllama",
    "gpt_oss",
)


def breadth() -> list:
    """Parameters of a test: the quick ones of BREADTH, the others marked slow."""
    return quick(QUICK, among=BREADTH)


def save_model(family: str, folder: Path, *, seed: int = 0, **changes) -> Path:
    """Save a random model of a family as config.json and model.safetensors.

    Args:
        changes: of its config, e.g. num_hidden_layers.
    """
    given = (LISTS["families"] | LISTS["breadth"] | LISTS["refused"])[family]
    return save_random(given, folder, AutoModelForCausalLM, seed=seed, **changes)


def save_random(given: dict, folder: Path, loader: type, *, seed: int = 0, **changes) -> Path:
    """Save a random model of a config, as the lists of families give it.

    Args:
        loader: a class of transformers that makes it.
        changes: of its config.
    """
    given = copy.deepcopy(given)  # in which configs change parts of others
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    for name, value in changes.items():
        setattr(config, name, value)
    model = loader.from_config(config)
    randomize(model, seed)
    model.save_pretrained(folder)
    return folder


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights under which every part matters: values of order 1 everywhere, gains and biases away from 1 and 0.

    Two channels of each gain are large, so that activations have the outliers that smoothing is for.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random)

    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # which experts a token takes, by its id
            with torch.no_grad():
                buffer.copy_(torch.stack([draw(16).argsort()[: buffer.shape[1]] % 4 for _ in buffer]))
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter is embedding:
                parameter.copy_(draw(*parameter.shape))
            elif parameter.dim() >= 2:
                parameter.copy_(draw(*parameter.shape) / parameter.shape[-1] ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(parameter + 0.2 * draw(*parameter.shape))
                parameter[3], parameter[-5] = 6.0, -4.0
            else:
                parameter.copy_(0.3 * draw(*parameter.shape))


def reference_model(folder: Path) -> torch.nn.Module:
    """The float model as transformers runs it, attention written out."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()
