"""Small random models that are no decoders: text encoders as folders, vision models and modules of one's own."""

from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

from helpers.breadth import quick
from helpers.random_decoders import LISTS, VOCAB, save_random
from helpers.runners import padded, tokens
from qexport.calibrate.encoder_inputs import encoder_batch
from qexport.calibrate.features import drawn_features
from qexport.capture.graph import CapturedModel

ENCODERS, MODULES, SEQ2SEQ, HEADS = (
    tuple(LISTS[kind]) for kind in ("encoders", "modules", "encoder_decoders", "heads")
)
# Of ENCODERS one for every thing that capture or lowering does for such models alone.
QUICK = ("bert", "roberta", "albert", "modernbert", "deberta")
# Of dynamic dimensions, in examples.
SIZES = {"batch": 2, "num_choices": 3, "texts": 2, "images": 3, "length": 7, "written": 5}


def encoders() -> list:
    """Parameters of a test: the quick ones of ENCODERS, the others marked slow."""
    return quick(QUICK, among=ENCODERS)


def save_encoder(family: str, folder: Path, *, seed: int = 0, loader: type = AutoModel, **changes) -> Path:
    """Save a random encoder as config.json and model.safetensors.

    Args:
        loader: a class of transformers that makes it with a head.
        changes: of its config.
    """
    given = LISTS["encoders"][family]
    return save_random(given, folder, loader, seed=seed, **changes)


def save_head(name: str, folder: Path, **changes) -> Path:
    """Save a random model of HEADS with its head; changes: of its config."""
    given = dict(LISTS["heads"][name])
    kind = getattr(transformers, given.pop("head"))
    if kind.main_input_name == "input_ids" and not hasattr(kind, "get_image_features"):  # which reads pictures too
        return save_random(given, folder, SimpleNamespace(from_config=kind), **changes)
    model = _random(kind(AutoConfig.for_model(given.pop("model_type"), **given, **changes)))
    model.save_pretrained(folder)
    return folder


def head_inputs(captured: CapturedModel) -> list[dict[str, torch.Tensor]]:
    """Two calls of a captured model of HEADS, padded on the right where it reads text."""
    if captured.kind == "module":
        known = captured.settings.get("vocab_size", 0)
        return [drawn_features(captured.inputs, rows, rows, known) for rows in (2, 3)]
    masks = (padded([7, 2, 5], "right"), torch.ones(2, 9, dtype=torch.int64))
    return [encoder_batch(captured, tokens(*mask.shape, vocab=VOCAB), mask) for mask in masks]


def make_module(family: str) -> nn.Module:
    """A random model of MODULES."""
    given = {name: value for name, value in LISTS["modules"][family].items() if name != "inputs"}
    kind, part = getattr(transformers, given.pop("model")), given.pop("part", "")
    return _random(kind(kind.config_class(**given)).get_submodule(part))


def example_inputs(family: str, more: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of a model of MODULES; more: by how much dynamic dimensions are longer."""
    made, random = {}, torch.Generator().manual_seed(1)
    for name, dims in LISTS["modules"][family]["inputs"].items():
        shape = [SIZES[dim] + more if isinstance(dim, str) else dim for dim in dims]
        if name.endswith("ids"):
            made[name] = tokens(*shape, vocab=VOCAB)
        elif name.endswith("mask"):
            made[name] = padded([shape[1] - 3, *[shape[1]] * (shape[0] - 1)], "right")
        else:
            made[name] = torch.randn(shape, generator=random)
    return made


def axes(family: str) -> dict[str, dict[int, str]]:
    """Dynamic dimensions of a model of MODULES."""
    inputs = LISTS["modules"][family]["inputs"].items()
    return {name: {i: dim for i, dim in enumerate(dims) if isinstance(dim, str)} for name, dims in inputs}


def looked_up(result, name: str) -> torch.Tensor:
    """The output of a module that an export calls `name`, in what forward returned."""
    if isinstance(result, torch.Tensor):
        return result
    for part in name.split("."):
        key, _, place = part.rpartition("_")
        result = result[part] if part in result else result[key][int(place)]
    return result


def _random(model: nn.Module) -> nn.Module:
    """Weights under which every part matters; see `random_decoders.randomize`."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=random)
            if parameter.dim() >= 2:
                parameter.copy_(drawn / parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.2 * drawn)
            elif parameter.dim():
                parameter.copy_(0.3 * drawn)
    return model.eval()


class Residual(nn.Module):
    """A depthwise block as mobile networks have them."""

    def __init__(self, channels: int):
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.deep = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.deep(self.act(self.norm(self.wide(x)))) + x)


class SmallCNN(nn.Module):
    """Images of any size to 10 numbers."""

    def __init__(self, channels: int = 32):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(2)
        self.layers = nn.Sequential(Residual(channels), Residual(channels))
        self.last = nn.Conv2d(channels, 2 * channels, 1)
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, image):
        x = self.layers(self.pool(torch.relu(self.norm(self.stem(image)))))
        return self.head(torch.nn.functional.relu6(self.last(x)).mean((2, 3)))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = SmallCNN().train()
    for _ in range(10):  # statistics of the batch norms
        model(torch.randn(8, 3, 16, 16))
    return model.eval()


def seq2seq_loader(config) -> type:
    """The auto class of transformers that makes an encoder-decoder of a config."""
    kinds = AutoModelForSpeechSeq2Seq, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
    return next(kind for kind in kinds if type(config) in kind._model_mapping)


def save_seq2seq(family: str, folder: Path, *, seed: int = 0, gain: float = 1.0) -> Path:
    """A small random encoder-decoder of a family; gain: of every matrix, above 1 for texts of more than one word."""
    given = dict(LISTS["encoder_decoders"][family])
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    model = seq2seq_loader(config).from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0, gain * parameter.shape[-1] ** -0.5, generator=generator)
    model.save_pretrained(folder)
    return folder
