"""LoRA adapters as PEFT saves them: what they change, and weights with the change in them.

W' = W + s B A of a linear, s = alpha / r, or alpha / sqrt(r) of rsLoRA; a DoRA divides every output's row of W' by its
norm and multiplies it by a magnitude; an embedding [vocabulary, features] gets (B A)^T. Modules to save take the place
of the base's.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..artifact.names import public_name
from ..errors import InputError

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "lm_head.weight"
_PREFIX = "base_model.model."
_PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<leaf>\.weight|\.bias)?$"
)
# Settings that mean something else than the formulas here, with what they are called where they are on.
_OTHERS = {
    "layer_replication": "layers are repeated", "megatron_config": "Megatron", "alora_invocation_tokens": "aLoRA",
    "trainable_token_indices": "single tokens are trained", "target_parameters": "parameters are targets",
    "use_qalora": "QALoRA", "arrow_config": "Arrow", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA",
}  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin that take a part out of the base weight


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of the base.

    Attributes:
        name: of the tensor, by the names of the base model.
        module: its module.
        scale: s of the formula; rank: r.
        low, high: names of A [r, K] and B [N, r] in the adapter's file; empty where the tensor is replaced.
        magnitude: the name of a DoRA's magnitudes [N]; empty without.
        embedding: the tensor is a table; turned: it is [K, N], as Conv1D has it.
        instead: the name of the tensor that takes its place; added: it is added, s times, as the bias of a B is.
    """

    name: str
    module: str
    scale: float = 1.0
    rank: int = 0
    low: str = ""
    high: str = ""
    magnitude: str = ""
    embedding: bool = False
    turned: bool = False
    instead: str = ""
    added: bool = False

    def apply(self, base: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor with the change in it, of base's shape and dtype.

        Args:
            base: floating point; of an embedding that has a base of its own in `instead` it is not looked at.
            read: a tensor of the adapter by name.
        """
        start = read(self.instead).to(base.dtype) if self.instead else base
        if self.added:
            return base + self.scale * start
        if not self.low:
            return start
        low, high = read(self.low).to(base.dtype), read(self.high).to(base.dtype)
        across = self.embedding or self.turned
        changed = start + self.scale * ((high @ low).t() if across else high @ low)
        if not self.magnitude:
            return changed
        rows = changed.t() if self.turned else changed
        size = (read(self.magnitude).to(base.dtype).flatten() / rows.norm(dim=1))[:, None]
        return changed * (size.t() if self.turned else size)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        folder: where; name: what the user called it.
        changes: by the name of the base's tensor.
        unties: a changed embedding or head, so that both are tensors of their own, whatever config.json says.
    """

    folder: Path
    name: str
    changes: Mapping[str, Change] = field(repr=False)
    unties: bool = False

    @property
    def sentence(self) -> str:
        """What it is, for people."""
        ranks = sorted({change.rank for change in self.changes.values() if change.rank})
        linear = [change for change in self.changes.values() if change.low]
        saved = [change.module for change in self.changes.values() if change.instead and not change.low]
        kind = "DoRA" if any(change.magnitude for change in linear) else "LoRA"
        parts = [f"{kind} of rank {' and '.join(map(str, ranks))} on {len(linear)} modules"] if linear else []
        parts += [f"{len(saved)} tensors of its own"] if saved else []
        return f"the adapter {public_name(self.name)} is merged into the weights: {', '.join(parts)}"

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        with safe_open(self.folder / WEIGHTS, framework="pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor:
        """A tensor of its file."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as handle:
            return handle.get_tensor(name)

    def placed(self, find: Callable[[str], str | None], shape: Callable[[str], tuple[int, ...]]) -> dict[str, Change]:
        """The changes by the names that a checkpoint has for its tensors.

        Args:
            find: what a tensor is called there; None where it is not.
            shape: of a tensor there.

        Raises:
            InputError: the base has no such module, or one of another shape.
        """
        placed = {}
        for change in self.changes.values():
            name = find(change.name)
            if name is None:
                raise InputError(
                    f"changes {change.module}, but the base has no {change.name}", place=self.name,
                    remedy="Give the model that the adapter was trained on",
                )  # fmt: skip
            self._check(change, shape(name))
            placed[name] = change
        return placed

    def _check(self, change: Change, base: tuple[int, ...]) -> None:
        shapes = self._shapes
        if change.low:
            (rank, k), (n, other) = shapes[change.low], shapes[change.high]
            fits = rank == other and base == ((k, n) if change.embedding or change.turned else (n, k))
            found = f"A {list(shapes[change.low])} and B {list(shapes[change.high])}"
        else:
            fits, found = shapes[change.instead] == base, f"{list(shapes[change.instead])}"
        if not fits:
            raise InputError(
                f"has {found} for {change.module}, but the base's tensor is {list(base)}", place=self.name,
                remedy="Give the model that the adapter was trained on",
            )  # fmt: skip


def open_adapter(path: str | Path, *, tied: bool = False) -> Adapter:
    """Read what an adapter changes; its tensors stay on disk.

    Args:
        path: a folder as PEFT saves it.
        tied: the base has one tensor for its embedding and its head.

    Raises:
        InputError: no adapter, one of another method, or with settings that mean something else.
    """
    folder, name = Path(path), str(path)
    config = _config(folder, name)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as handle:
            names = list(handle.keys())
            lows = [n for n in names if n.endswith(("lora_A.weight", "lora_embedding_A"))]
            ranks = {n: handle.get_slice(n).get_shape()[0] for n in lows}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"its {WEIGHTS} cannot be read ({error})", place=name, remedy="Save the adapter again as safetensors"
        ) from error
    found = _changes(config, names, ranks, name)
    ends = {change.name for change in found if change.name == HEAD or "embed" in change.module.rpartition(".")[2]}
    return Adapter(folder.resolve(), name, {change.name: change for change in found}, tied and bool(ends))


def _config(folder: Path, name: str) -> dict[str, Any]:
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"has no {CONFIG} that can be read ({type(error).__name__})", place=name,
            remedy="Give the folder that PEFT saved the adapter in",
        ) from None  # fmt: skip
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        kind = said.get("peft_type") if isinstance(said, dict) else None
        raise InputError(
            f"is not a LoRA but {kind}", place=name,
            remedy="Merge it with peft (merge_and_unload) and export the result",
        )  # fmt: skip
    odd = [what for key, what in _OTHERS.items() if said.get(key)]
    begun = said.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
        odd.append(f"init_lora_weights is {begun}, which changes the base")
    if odd:
        raise InputError(
            f"is a kind of LoRA that is not supported ({odd[0]})", place=name,
            remedy="Merge it with peft (merge_and_unload) and export the result",
        )  # fmt: skip
    return said


def _changes(config: Mapping[str, Any], names: Iterable[str], ranks: Mapping[str, int], place: str) -> list[Change]:
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for full in names:
        name = full.removeprefix(_PREFIX)
        if (match := _PARTS.fullmatch(name)) is not None:
            part = match["part"].removeprefix("lora_").removeprefix("embedding_")
            part = "bias" if match["leaf"] == ".bias" else part
            kind = {"embedding": "yes"} if "embedding" in match["part"] else {}
            parts.setdefault(match["module"], {}).update({part: full, **kind})
        else:
            whole[name] = full
    turned = bool(config.get("fan_in_fan_out"))
    found = []
    for module, names_of in parts.items():
        if not {"A", "B"} <= names_of.keys():
            raise InputError(f"has no A or no B for {module}", place=place, remedy="Save the adapter again")
        table = "embedding" in names_of
        if table and ("magnitude_vector" in names_of):
            raise InputError(
                f"is a DoRA of the embedding {module}", place=place, remedy="Merge it with peft and export the result"
            )
        rank = ranks[names_of["A"]]
        base = whole.pop(f"{module}.base_layer.weight", "")
        change = Change(
            f"{module}.weight", module, _scale(config, module, rank), rank, names_of["A"], names_of["B"],
            names_of.get("magnitude_vector", ""), table, turned and not table, base,
        )  # fmt: skip
        found.append(change)
        if "bias" in names_of:
            found.append(Change(f"{module}.bias", module, change.scale, instead=names_of["bias"], added=True))
    for name, full in whole.items():
        if ".base_layer." in name:
            name = name.replace(".base_layer.", ".")
        if "lora_" in name or "token_adapter" in name:
            raise InputError(
                f"holds {name}, which is unknown", place=place, remedy="Merge it with peft and export the result"
            )
        found.append(Change(name, name.rpartition(".")[0], instead=full))
    return found


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """s of a module: patterns take the place of r and alpha for modules whose path ends like them."""

    def by_pattern(key: str, otherwise: Any) -> Any:
        for pattern, value in (config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return otherwise

    alpha = float(by_pattern("alpha_pattern", config.get("lora_alpha", rank)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
