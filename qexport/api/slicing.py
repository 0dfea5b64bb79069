"""A smaller export out of one with 8-bit codes: their upper bits, without the model, data or calibration."""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..artifact import manifest as manifests
from ..artifact.files import read_json
from ..artifact.manifest import LinearEntry, Manifest
from ..artifact.output import claimed
from ..errors import InputError
from ..lower.saving import write_model
from ..lower.slice_model import FROM_BITS, TO_BITS, Sliced, slice_model
from ..progress import Progress, no_progress
from ..report import read_export, write_card
from ..report.card import CARD_FILE
from ..validation.report_store import REPORT_FILE

# Written anew, or said of the other file.
_OWN = {manifests.MODEL_FILE, f"{manifests.MODEL_FILE}.data", manifests.MANIFEST_FILE, REPORT_FILE, CARD_FILE}


@dataclass(frozen=True)
class SliceResult:
    """What `slice_export` wrote.

    Attributes:
        folder: of the smaller export.
        manifest: its.
        bits: of its codes.
        products: how many were sliced.
        before, after: bytes of model.onnx and its data.
    """

    folder: Path
    manifest: Manifest
    bits: int
    products: int
    before: int
    after: int

    def as_dict(self) -> dict[str, Any]:
        """In plain types."""
        return asdict(self) | {"folder": str(self.folder), "manifest": None} | {"linears": len(self.manifest.linears)}


def slice_export(
    folder: str | os.PathLike[str],
    *,
    bits: int,
    out_dir: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> SliceResult:
    """Write the upper bits of an export's 8-bit codes as an export of its own (Matryoshka quantization).

    How close it is depends on how the codes were found: `weights: {method: matquant}` finds those whose upper bits are
    good too. `validate` measures it.

    Args:
        folder: an export with 8-bit weights in groups; it stays as it is.
        bits: 4 or 2.
        out_dir: folder to make.
        overwrite: replace an earlier export there.
        progress: called with (stage, what, done, total).

    Raises:
        InputError: nothing to slice, or bits of another number.
        LoweringError: there is no kernel for what would come of it.
    """
    folder, out = Path(folder), Path(out_dir)
    if bits not in TO_BITS:
        raise InputError(
            f"a slice cannot have {bits} bits", place="bits", remedy=f"Use {' or '.join(map(str, TO_BITS))}"
        )
    manifest = manifests.load(folder)
    if manifest.kind in (manifests.SEQ2SEQ, manifests.VISION_LANGUAGE):
        raise InputError("has several parts", place=str(folder), remedy="Slice each of them")
    with claimed(out, overwrite, model=folder) as work, work.appearing() as new:
        model = ir.load(folder / manifests.MODEL_FILE)
        sliced = {found.node: found for found in slice_model(model, bits)}
        for path in folder.iterdir():
            if path.is_file() and path.name not in _OWN:
                shutil.copyfile(path, new / path.name)
        kept = sum(path.stat().st_size for path in new.iterdir())
        size = write_model(new, model, lambda done, total: progress("write", "model.onnx.data", done, total)) - kept
        entries = tuple(_entry(entry, sliced.get(entry.node), bits) for entry in manifest.linears)
        before = manifest.bytes.get("model", 0)
        made = manifest.model_copy(update={"linears": entries, "bytes": _bytes(manifest, entries, size)})
        manifests.save(made, new)
        _write_report(folder, new, bits)
        write_card(read_export(new))
    return SliceResult(work.given, made, bits, len(sliced), before, size)


def _entry(entry: LinearEntry, found: Sliced | None, bits: int) -> LinearEntry:
    if found is None:
        return entry
    scheme = re.sub(rf"^w{FROM_BITS}", f"w{bits}", entry.scheme)
    size = round(entry.bytes * found.after / found.before)
    return entry.model_copy(update={
        "scheme": scheme, "bytes": size, "reason": f"the upper {bits} bits of {entry.scheme}",
    })  # fmt: skip


def _bytes(manifest: Manifest, entries: tuple[LinearEntry, ...], size: int) -> dict[str, int]:
    """Sizes by part: the linears' share is what they are now, and the rest what it was."""
    found, total = dict(manifest.bytes), sum(entry.bytes for entry in manifest.linears)
    pairs = list(zip(manifest.linears, entries, strict=True))
    others = found.get("quantized_linears", total)
    # The output projection has a part of its own.
    head = next((old.name for old, _ in reversed(pairs) if old.bytes and total - old.bytes == others), "")
    for old, new in pairs:
        part = "lm_head" if old.name == head else "quantized_linears"
        found[part] = found.get(part, 0) - old.bytes + new.bytes
    found["model"] = size
    parts = sum(value for name, value in found.items() if name not in ("model", "rest"))
    return found | {"rest": size - parts}


def _write_report(folder: Path, new: Path, bits: int) -> None:
    """What is known of the export it was made of, without what was measured of that."""
    path = folder / REPORT_FILE
    export = read_json(path).get("export") if path.is_file() else None
    known = export if isinstance(export, dict) else {}
    text = json.dumps({"export": known | {"sliced": {"from": FROM_BITS, "to": bits}}}, indent=2)
    (new / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
