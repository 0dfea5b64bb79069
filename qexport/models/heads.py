"""What a checkpoint is for, by the class that its config names: text, another head, or hidden states.

Every task is an entry of `HEADS`: the class of transformers that loads such a model, and what its outputs decide.
"""

from dataclasses import dataclass
from typing import Any, Literal

import transformers
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from ..errors import CaptureError
from .keypoints import Maps

Decision = Literal["class", "class of a pixel", "yes or no", "embedding", ""]


@dataclass(frozen=True)
class Head:
    """A kind of model that reads an input whole.

    Attributes:
        task: its name, as pipelines of transformers call it where they have it.
        loader: what loads such a model: an auto class of transformers, or what has its methods.
        decides: what is read off its logits: the likeliest of the last axis ("class") or of the second one ("class of a
            pixel"), which of them are above 0 ("yes or no"), how near two rows are ("embedding"), or the numbers as
            they are ("").
        optional: without weights for it the model is one without a head: checkpoints are known to lack them.
    """

    task: str
    loader: Any
    decides: Decision = "class"
    optional: bool = False


# In order: a class that is in several lists has the first of them.
_NAMES = {
    Head("text-classification", transformers.AutoModelForSequenceClassification): "SEQUENCE_CLASSIFICATION",
    Head("token-classification", transformers.AutoModelForTokenClassification): "TOKEN_CLASSIFICATION",
    Head("question-answering", transformers.AutoModelForQuestionAnswering): "QUESTION_ANSWERING",
    Head("table-question-answering", transformers.AutoModelForTableQuestionAnswering, "yes or no"):
        "TABLE_QUESTION_ANSWERING",
    Head("multiple-choice", transformers.AutoModelForMultipleChoice): "MULTIPLE_CHOICE",
    Head("next-sentence", transformers.AutoModelForNextSentencePrediction): "NEXT_SENTENCE_PREDICTION",
    Head("fill-mask", transformers.AutoModelForMaskedLM, optional=True): "MASKED_LM",
    Head("image-classification", transformers.AutoModelForImageClassification): "IMAGE_CLASSIFICATION",
    Head("video-classification", transformers.AutoModelForVideoClassification): "VIDEO_CLASSIFICATION",
    Head("image-segmentation", transformers.AutoModelForSemanticSegmentation, "class of a pixel"):
        "SEMANTIC_SEGMENTATION",
    Head("instance-segmentation", transformers.AutoModelForUniversalSegmentation): "UNIVERSAL_SEGMENTATION",
    Head("image-segmentation", transformers.AutoModelForImageSegmentation): "IMAGE_SEGMENTATION",
    Head("object-detection", transformers.AutoModelForObjectDetection): "OBJECT_DETECTION",
    Head("depth-estimation", transformers.AutoModelForDepthEstimation, ""): "DEPTH_ESTIMATION",
    Head("normal-estimation", transformers.AutoModelForNormalEstimation, ""): "NORMAL_ESTIMATION",
    Head("pose-estimation", transformers.AutoModelForPoseEstimation, ""): "POSE_ESTIMATION",
    Head("keypoint-detection", Maps(), ""): "KEYPOINT_DETECTION",
    Head("image-matting", transformers.AutoModelForImageMatting, ""): "IMAGE_MATTING",
    Head("image-to-image", transformers.AutoModelForImageToImage, ""): "IMAGE_TO_IMAGE",
    Head("automatic-speech-recognition", transformers.AutoModelForCTC): "CTC",
    Head("audio-classification", transformers.AutoModelForAudioClassification): "AUDIO_CLASSIFICATION",
    Head("audio-frame-classification", transformers.AutoModelForAudioFrameClassification, "yes or no"):
        "AUDIO_FRAME_CLASSIFICATION",
    Head("zero-shot-image-classification", transformers.AutoModelForZeroShotImageClassification):
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
    Head("audio-xvector", transformers.AutoModelForAudioXVector, "embedding"): "AUDIO_XVECTOR",
}  # fmt: skip
HEADS = {head: getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for head, name in _NAMES.items()}
PRETRAINING = Head("pretraining", transformers.AutoModelForPreTraining, "")
HIDDEN_STATES = Head("feature-extraction", transformers.AutoModel, "")
_WRITES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how classes of language models are called
_SEVERAL_LABELS = "multi_label_classification"  # as configs say it


def head_of(config: PretrainedConfig, place: str) -> Head | None:
    """What the checkpoint says it is; None for a language model that writes text.

    Args:
        place: what the user calls the model.

    Raises:
        CaptureError: the config names a class that is no language model and has no head that is known.
    """
    named = set(config.architectures or ())
    causal = _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config) | _custom(config, "AutoModelForCausalLM")
    for head, known in HEADS.items():
        if named & (_names(known, config) | _custom(config, head.loader.__name__)) - causal:
            return head
    if _fills_masks(config):
        pretrained = _names(modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES, config)
        return PRETRAINING if named & pretrained else HIDDEN_STATES
    if named & _names(modeling_auto.MODEL_MAPPING_NAMES, config):
        return HIDDEN_STATES
    if not named or named & causal or any(name.endswith(_WRITES) for name in named):
        return None
    raise CaptureError(
        f"config.json names {', '.join(sorted(named))}, which is neither a language model nor a classifier that "
        "transformers knows", place=place,
        remedy="Pass it as an nn.Module with example inputs; or set architectures to its class in transformers",
    )  # fmt: skip


def in_two_parts(config: PretrainedConfig) -> bool:
    """Whether it is an encoder-decoder that writes: detectors have a decoder too, which reads everything at once."""
    named = {name for name in config.architectures or () if not name.endswith(_WRITES)}
    return bool(config.is_encoder_decoder) and not any(named & _names(known, config) for known in HEADS.values())


def decision_of(head: Head, config: PretrainedConfig) -> Decision:
    """What is read off the logits of a model with this head."""
    several = getattr(config, "problem_type", None) == _SEVERAL_LABELS
    return "yes or no" if several and head.decides == "class" else head.decides


def reads_text(config: PretrainedConfig) -> bool:
    """Whether the class that a config names reads token ids alone; so does one that transformers does not know."""
    classes = (getattr(transformers, name, None) for name in config.architectures or ())
    ids = all(getattr(found, "main_input_name", "input_ids") == "input_ids" for found in classes)
    return ids and not compares(config)


def reads_more_than_text(config: PretrainedConfig) -> bool:
    """Whether the class that a config names writes text about pictures or sound beside text."""
    known = _names(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, config)
    writers = _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config)
    return bool(known.difference(writers).intersection(config.architectures or ()))


def compares(config: PretrainedConfig) -> bool:
    """Whether the class that a config names reads pictures and texts, and says how well they go together (CLIP)."""
    known = _names(modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES, config)
    return bool(known.intersection(config.architectures or ()))


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
