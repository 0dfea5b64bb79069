"""What onnxruntime-genai needs to run an exported model of pictures and text: its config, and how pictures are read.

It has architectures of its own for these, whose decoders read embeddings and positions as those of qexport do; pictures
go through its own processor, which a second file describes.
"""

from collections.abc import Mapping
from typing import Any

from ..artifact.cache_names import EMBEDDINGS, TOKEN_IDS
from ..artifact.manifest import DECODER, EMBEDDING, MODEL_FILE, VISION, Manifest
from ..errors import InputError
from .genai import genai_config, provider_options
from .vision_language import FEATURES

PROCESSOR_FILE = "genai_processor.json"
_TOKENS_PER_SECOND = 2.0  # of films, which are not read
_SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id")


def pictures_config(
    name: str,
    parts: Mapping[str, Manifest],
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    eos_token_id: int | None = None,
) -> dict[str, Any]:
    """Contents of genai_config.json for the folder of all parts.

    Args:
        name: what onnxruntime-genai calls the architecture.
        parts: the manifests, by the names of their folders.
        config, generation_config, eos_token_id: see `genai_config`.

    Raises:
        InputError: as `genai_config`, or the config lacks a token.
    """
    found = genai_config(parts[DECODER], config, generation_config, eos_token_id)
    model, vision = found["model"], config["vision_config"]
    model["type"] = name
    decoder = model["decoder"]
    decoder["filename"] = f"{DECODER}/{MODEL_FILE}"
    del decoder["inputs"][TOKEN_IDS]
    decoder["inputs"][EMBEDDINGS] = EMBEDDINGS
    model[EMBEDDING] = {
        **_session(EMBEDDING, parts), "inputs": {name: name for name in (TOKEN_IDS, FEATURES)},
        "outputs": {EMBEDDINGS: EMBEDDINGS},
    }  # fmt: skip
    model[VISION] = {
        **_session(VISION, parts), "config_filename": PROCESSOR_FILE, "tokens_per_second": _TOKENS_PER_SECOND,
        "patch_size": vision["patch_size"], "spatial_merge_size": vision["spatial_merge_size"],
        "inputs": {name: name for name in parts[VISION].settings["inputs"]}, "outputs": {FEATURES: FEATURES},
    }  # fmt: skip
    missing = [name for name in _SPECIAL if not isinstance(config.get(name), int)]
    if missing:
        raise InputError(f"the model's config names no {missing[0]}", remedy="Set it in config.json")
    model |= {name: config[name] for name in _SPECIAL}
    return found


def _session(part: str, parts: Mapping[str, Manifest]) -> dict[str, Any]:
    options = {
        "log_id": "onnxruntime-genai", **parts[part].session, "provider_options": provider_options(parts[part])
    }  # fmt: skip
    return {"filename": f"{part}/{MODEL_FILE}", "session_options": options}


def pictures_processor(config: Mapping[str, Any]) -> dict[str, Any]:
    """How onnxruntime-genai makes patches of pictures, by what transformers' processor of them says of itself.

    Raises:
        InputError: that says too little.
    """
    sizes = config.get("size") or {}
    least, most = (
        config.get(name) or sizes.get(edge)
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    )
    needed = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    missing = [name for name in needed if config.get(name) is None]
    if missing or not least or not most:
        raise InputError(f"the model's processor of pictures says no {(missing or ['size'])[0]}")
    patches = {name: config[name] for name in ("patch_size", "temporal_patch_size", "merge_size")}
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("decode_image", "DecodeImage", {"color_space": "RGB"}),
        ("convert_to_rgb", "ConvertRGB", {}),
        ("resize", "Resize", {
            "width": 540, "height": 360, "smart_resize": 1, "min_pixels": least, "max_pixels": most,
            "patch_size": patches["patch_size"], "merge_size": patches["merge_size"],
        }),
        ("rescale", "Rescale", {"rescale_factor": config.get("rescale_factor", 1 / 255)}),
        ("normalize", "Normalize", {"mean": config["image_mean"], "std": config["image_std"], "qwen2_5_vl": 1}),
        ("patch_image", "PatchImage", patches),
    ]  # fmt: skip
    transforms = [
        {"operation": {"name": name, "type": kind, **({"attrs": given} if given else {})}}
        for name, kind, given in steps
    ]  # fmt: skip
    return {"processor": {"name": "qwen2_5_image_processor", "transforms": transforms}}
