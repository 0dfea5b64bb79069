"""What a checkpoint is for, by the class that its config names: a language model, a classifier, hidden states."""

from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.models.auto import modeling_auto

from ..errors import CaptureError

# Heads that are kept, by the class that loads a model with one.
_HEADS = {
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForTokenClassification: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForQuestionAnswering: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
_WRITES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how classes of language models are called


def loader_of(config: PretrainedConfig, place: str) -> type | None:
    """The auto class that loads what the checkpoint says it is; None for a language model that writes text.

    Args:
        place: what the user calls the model.

    Raises:
        CaptureError: the config names a class that is no language model and has no head that is known.
    """
    named = set(config.architectures or ())
    for loader, known in _HEADS.items():
        if named & (_names(known, config) | _custom(config, loader.__name__)):
            return loader
    if _fills_masks(config) or named & _names(modeling_auto.MODEL_MAPPING_NAMES, config):
        return AutoModel
    causal = _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config) | _custom(config, "AutoModelForCausalLM")
    if not named or named & causal or any(name.endswith(_WRITES) for name in named):
        return None
    raise CaptureError(
        f"config.json names {', '.join(sorted(named))}, which is neither a language model nor a classifier that "
        "transformers knows", place=place,
        remedy="Pass it as an nn.Module with example inputs; or set architectures to its class in transformers",
    )  # fmt: skip


def note_on_bare(config: PretrainedConfig) -> list[str]:
    """A sentence where the config names a decoder without its output projection, which may be meant or not."""
    bare = set(config.architectures or ()) & _names(modeling_auto.MODEL_MAPPING_NAMES, config)
    writers = _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config)
    if not bare or not writers or _fills_masks(config):
        return []
    return [
        f"config.json names {' and '.join(sorted(bare))}, so the export gives hidden states and writes no text; if its "
        f"weights are a language model's, set architectures to {' or '.join(sorted(writers))}"
    ]


def _names(known, config: PretrainedConfig) -> set[str]:
    found = known.get(config.model_type, ())
    return {found} if isinstance(found, str) else set(found)


def _custom(config: PretrainedConfig, auto: str) -> set[str]:
    """The class of custom code that comes with a checkpoint, for one auto class."""
    stated = (getattr(config, "auto_map", None) or {}).get(auto)
    return {stated.rpartition(".")[2]} if isinstance(stated, str) else set()


def _fills_masks(config: PretrainedConfig) -> bool:
    """Whether transformers knows the model as one that fills in masked tokens, and its checkpoint is no decoder's."""
    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    known = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    return known and not causal.intersection(config.architectures or ()) and not getattr(config, "is_decoder", False)
