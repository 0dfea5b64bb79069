"""What onnxruntime-genai needs to run an exported Whisper: its two files, and how sound becomes their spectrograms."""

from collections.abc import Mapping
from typing import Any

from ..artifact.manifest import DECODER, ENCODER, MODEL_FILE, SPECTRA, STATES, Manifest
from ..errors import InputError

AUDIO_FILE = "audio_processor_config.json"
KINDS = frozenset({"whisper"})
_POSITIONS = 1500  # of a source; genai has no setting for it
_SEARCH = {
    "do_sample": False, "early_stopping": True, "temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_length": 0,
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0,
    "diversity_penalty": 0.0, "no_repeat_ngram_size": 0, "past_present_share_buffer": False,
}  # fmt: skip


def genai_config(parts: Mapping[str, Manifest], config: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of genai_config.json for an exported Whisper, in whose folder those of its parts lie.

    Args:
        parts: manifests of "encoder" and "decoder".
        config: config.json of the model.
        said: generation_config.json, and config.json where that says nothing.

    Raises:
        InputError: sources of another length than genai's, a target that it is not configured for, or no end of texts.
    """
    positions = config.get("max_source_positions")
    if positions != _POSITIONS:
        raise InputError(f"onnxruntime-genai reads sources of {_POSITIONS} positions, and this model of {positions}")
    end = said.get("eos_token_id")
    if end is None:
        raise InputError("the model's configs name no eos_token_id", remedy="Set it in generation_config.json")
    pad = said.get("pad_token_id", end[0] if isinstance(end, list) else end)
    longest, layers = config["max_target_positions"], config["decoder_layers"]
    cache = {"key": "%d.key", "value": "%d.value"}
    return {
        "model": {
            "type": "whisper", "vocab_size": config["vocab_size"], "context_length": longest,
            "bos_token_id": said.get("bos_token_id", pad), "eos_token_id": end, "pad_token_id": pad,
            "encoder": {
                **_part(parts[ENCODER], ENCODER, config, config["encoder_layers"]),
                "inputs": {"audio_features": SPECTRA},
                "outputs": {
                    "encoder_hidden_states": STATES,
                    **{f"cross_present_{part}_names": f"cross_key_values.{name}" for part, name in cache.items()},
                },
            },
            "decoder": {
                **_part(parts[DECODER], DECODER, config, layers),
                "inputs": {
                    "input_ids": "input_ids",
                    **{f"past_{part}_names": f"past_key_values.{name}" for part, name in cache.items()},
                    **{f"cross_past_{part}_names": f"cross_key_values.{name}" for part, name in cache.items()},
                },
                "outputs": {
                    "logits": "logits", **{f"present_{part}_names": f"present.{name}" for part, name in cache.items()},
                },
            },
        },
        "search": {**_SEARCH, "max_length": longest},
    }  # fmt: skip


def _part(manifest: Manifest, part: str, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """What the two have in common."""
    if manifest.genai_provider_options is None:
        raise InputError(f"onnxruntime-genai is not configured for the target {manifest.target}")
    heads, width = config[f"{part}_attention_heads"], config["d_model"]
    return {
        "filename": f"{part}/{MODEL_FILE}", "hidden_size": width, "head_size": width // heads,
        "num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": layers,
        "session_options": {
            "log_id": "onnxruntime-genai", **manifest.session,
            "provider_options": list(manifest.genai_provider_options),
        },
    }  # fmt: skip


def audio_config(extractor: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of AUDIO_FILE: how onnxruntime-extensions makes spectrograms of sound.

    Args:
        extractor: preprocessor_config.json of the model; Whisper's own sizes where it says nothing.
    """
    size, hop = extractor.get("n_fft", 400), extractor.get("hop_length", 160)
    steps = [
        {"name": "audio_decoder", "type": "AudioDecoder"},
        {"name": "STFT", "type": "STFTNorm", "attrs": {"n_fft": size, "frame_length": size, "hop_length": hop}},
        {
            "name": "log_mel_spectrogram", "type": "LogMelSpectrum",
            "attrs": {
                "chunk_size": extractor.get("chunk_length", 30), "hop_length": hop, "n_fft": size,
                "n_mel": extractor.get("feature_size", 80),
            },
        },
    ]  # fmt: skip
    return {"feature_extraction": {"sequence": [{"operation": step} for step in steps]}}
