"""genai_config.json: what onnxruntime-genai needs to know to run an exported decoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifact.files import read_json
from ..artifact.manifest import GENAI_FILE, MODEL_FILE, Manifest
from ..errors import InputError

# Types that onnxruntime-genai runs as a plain decoder: tokens, mask and positions in, logits and separate keys and
# values out. The type still picks tool-call and reasoning tokens, so it is kept where it is known.
_PLAIN_DECODERS = frozenset(
    {
        "chatglm", "decoder", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gptoss", "granite", "hunyuandensev1",
        "internlm2", "llama", "mistral", "nemotron", "olmo", "phi", "phi3", "phi3small", "phimoe", "qwen2", "qwen3",
        "smollm3",
    }
)  # fmt: skip
# Those that keep states of convolutions beside keys and values.
_WITH_STATES = frozenset({"lfm2", "lfm2_moe"})
# Model types of transformers under the name they have there.
_RENAMED = {"gpt_oss": "gptoss", "hunyuan_v1_dense": "hunyuandensev1"}
_UNSTATED = 2048  # tokens, for a model whose config states no longest text: attention by ALiBi knows none
_SEARCH = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
}


def model_type(name: str) -> str:
    """The type under which onnxruntime-genai runs a decoder of the transformers type `name`.

    It refuses to load types it does not know, and gives some it knows another interface (gpt2: keys and values in one
    tensor). All of those become "decoder", the plain one; so does what keeps more than keys and values elsewhere.
    """
    name = _RENAMED.get(name, name)
    return name if name in _PLAIN_DECODERS else "decoder"


def genai_config(
    manifest: Manifest,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    eos_token_id: int | None = None,
) -> dict[str, Any]:
    """Contents of genai_config.json for an exported decoder.

    Args:
        manifest: manifest of the export. Its session entries become session options, so that the numbers are the same
            as in a session of qexport.
        config: config.json of the model.
        generation_config: generation_config.json of the model; where present, its tokens and search defaults win.
        eos_token_id: the tokenizer's, taken where neither config names one.

    Raises:
        InputError: not a decoder, or the configs lack a size or an end-of-sequence token.
    """
    if manifest.kind != "decoder":
        raise InputError(f"onnxruntime-genai runs decoders, and this export is a {manifest.kind}")
    states, kind = manifest.settings.get("layer_types"), _text_config(config).get("model_type", "decoder")
    if states and kind not in _WITH_STATES:
        raise InputError(f"onnxruntime-genai does not know states of layers of the type {kind}")
    generation = {key: value for key, value in (generation_config or {}).items() if value is not None}
    text = _text_config(config)
    tokens = {key: generation.get(key, text.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    eos = tokens["eos_token_id"]
    if eos is None or eos == []:
        eos = tokens["eos_token_id"] = eos_token_id
    if eos is None:
        raise InputError("the model's configs name no eos_token_id", remedy="Set it in generation_config.json")
    if tokens["pad_token_id"] is None:
        tokens["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    sizes, vocabulary = {**text, **manifest.settings}, _need(manifest.settings, "vocab_size")
    context = sizes.get("max_position_embeddings", _UNSTATED)
    search = {key: generation.get(key, default) for key, default in _SEARCH.items()}
    # To transformers 0 means all tokens, and more than there are means it too; genai refuses the second, and what it
    # makes of the first depends on its other options.
    search["top_k"] = min(search["top_k"] or vocabulary, vocabulary)
    return {
        "model": {
            "type": kind if states else model_type(kind),
            "vocab_size": vocabulary,
            "context_length": context,
            **{key: value for key, value in tokens.items() if value is not None},
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    **manifest.session,
                    "provider_options": provider_options(manifest),
                },
                "hidden_size": _need(sizes, "hidden_size"),
                "head_size": _need(manifest.settings, "head_dim"),
                "num_attention_heads": _need(sizes, "num_attention_heads"),
                "num_key_value_heads": _need(manifest.settings, "num_key_value_heads"),
                "num_hidden_layers": _need(manifest.settings, "num_hidden_layers"),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **({"position_ids": "position_ids"} if manifest.settings.get("position_ids", True) else {}),
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                    **({"past_conv_names": "past_conv.%d"} if states else {}),
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                    **({"present_conv_names": "present_conv.%d"} if states else {}),
                },
                **{key: manifest.settings[key] for key in ("layer_types", "conv_cache_size") if states},
            },
        },
        "search": {
            **search,
            "min_length": 0,
            "max_length": context,
            "num_beams": 1,
            "num_return_sequences": 1,
            "early_stopping": True,
            "past_present_share_buffer": bool(manifest.settings.get("past_present_share_buffer", False)),
        },
    }


def context_length(folder: str | Path) -> int | None:
    """How many tokens the model of a folder reads at most, or None where its configs do not say.

    Raises:
        InputError: a config is no JSON object.
    """
    genai, config = Path(folder) / GENAI_FILE, Path(folder) / "config.json"
    if genai.is_file():
        model = read_json(genai).get("model")
        found = model.get("context_length") if isinstance(model, Mapping) else None
    else:
        found = _text_config(read_json(config)).get("max_position_embeddings") if config.is_file() else None
    return found if isinstance(found, int) and found > 0 else None


def provider_options(manifest: Manifest) -> list[dict[str, dict[str, str]]]:
    """Provider options of onnxruntime-genai for an export.

    Raises:
        InputError: it does not run the target.
    """
    if manifest.genai_provider_options is None:
        raise InputError(f"onnxruntime-genai is not configured for the target {manifest.target}")
    return list(manifest.genai_provider_options)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the text decoder; multimodal models nest it."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def _need(sizes: Mapping[str, Any], key: str) -> Any:
    if sizes.get(key) is None:
        raise InputError(f"{key} is missing", remedy="It is needed in config.json or in the manifest's settings")
    return sizes[key]
