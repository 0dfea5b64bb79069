"""The manifest of an export: what is in the folder, and which session options its numbers depend on."""

import json
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import InputError
from .checksums import MANIFEST_FILE
from .dtypes import FLOATS
from .feature_order import unpacked
from .files import read_json
from .output import check_there
from .token_ids import check_token_ids

Kind = Literal["decoder", "encoder", "module"]
FORMAT: Final = 1
MODEL_FILE = "model.onnx"
FLOAT: Final = "float"  # scheme of what stays float; files of other tools have linears of floats among the others
GENAI_FILE = "genai_config.json"
RECIPE_FILE = "recipe.yaml"
SEQ2SEQ: Final = "encoder-decoder"  # kind of a folder of two exports,
ENCODER, DECODER = "encoder", "decoder"  # which are in these folders
VISION_LANGUAGE: Final = "vision-language"  # kind of a folder of three exports, which are in these folders
VISION, EMBEDDING = "vision", "embedding"
PICTURE_PARTS = (VISION, EMBEDDING, DECODER)
SOURCE_MASK = "encoder_attention_mask"  # input of the decoder: the attention mask of the source
SPECTRA = "input_features"  # input of an encoder of spectrograms
STATES = "encoder_hidden_states"  # and what such an encoder hands out besides, for onnxruntime-genai
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# By the name that onnxruntime-genai has for it, the provider that a folder of its builder runs on; the CPU for others.
_OF_GENAI = {"cuda": CUDA}
# The kernel of a recurrent layer with the product of its input, which is one of the linears.
STATIC_LSTM = "DynamicQuantizeLSTM"
QMOE = "QMoE"  # the kernel that computes many linears, the experts of a mixture, in one node


# Settings that are sizes, and the types of others.
_SIZES = frozenset(
    {"max_position_embeddings", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
     "hidden_size", "vocab_size", "prompts_from", "conv_cache_size"}
)  # fmt: skip
_KINDS = {"filename": str, "inputs": dict, "layer_types": list, "attention": str, "logits": str, "padding_counts": bool}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LinearEntry(_Frozen):
    """One planned linear and the ONNX node that computes it.

    Attributes:
        name: module path of the linear, e.g. "model.layers.0.self_attn.q_proj".
        block: name of the block it belongs to.
        scheme: scheme name, e.g. "w4a16_g32", or "float".
        input: name of the float value that it reads, before it is rounded; "" in files that do not say, and of what
            makes no value of its own, see `output`.
        output: name of the value that holds its result (bias and scales applied); "" of experts that are computed
            together (kernel QMoE), and of the input of a recurrent layer in the same node (kernel DynamicQuantizeLSTM):
            they make no value of their own.
        columns: [start, stop) of its result in that value, where one product computes several linears; None: all.
        node: name of its MatMul node. Fusion keeps it, so it finds the node in the optimized graph.
        kernel: op type the node must have in the optimized graph.
        prompt_kernel: the same in the branch for prompts; None where the file has none, or the linear is outside of it.
        parts: (node, kernel) of further products, where the linear is the sum of several.
        shape: [out_features N, in_features K].
        input_order: in which order the value that it reads has the features of the float model's, see `feature_order`;
            empty where it is that order. Codes with act-order are read so.
        result_order: the same of its result.
        bytes: size of its codes, scales, zero points and correction branch; a share by columns of what several have.
        reason: why it got this scheme.
        fast: where the target has several kernels for it, as CUDA has for MatMulNBits, whether its product has the
            shape for fpA_intB; None elsewhere.
        slow: why it has not.
    """

    name: str
    block: str = ""
    scheme: str
    input: str = ""
    output: str
    columns: tuple[int, int] | None = None
    node: str
    kernel: str
    prompt_kernel: str | None = None
    parts: tuple[tuple[str, str], ...] = ()
    shape: tuple[int, int]
    input_order: str = ""
    result_order: str = ""
    bytes: int = 0
    reason: str = ""
    fast: bool | None = None
    slow: str = ""

    @field_validator("columns")
    @classmethod
    def _some(cls, columns: tuple[int, int] | None) -> tuple[int, int] | None:
        if columns is not None and not 0 <= columns[0] < columns[1] < 2**31:
            raise ValueError("not the first column and the one after the last")
        return columns

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for text, size in ((self.result_order, self.shape[0]), (self.input_order, self.shape[1])):
            if text:
                unpacked(text, size)
        return self

    @property
    def reads_order(self) -> np.ndarray | None:
        """`input_order` as int64 [K]; None for the order of the float model."""
        return unpacked(self.input_order, self.shape[1]) if self.input_order else None

    @property
    def makes_order(self) -> np.ndarray | None:
        """`result_order` as int64 [N]; None for the order of the float model."""
        return unpacked(self.result_order, self.shape[0]) if self.result_order else None


class ConvolutionEntry(_Frozen):
    """One quantized convolution. Its node goes by its name, and has to be a QLinearConv in the optimized graph.

    Attributes:
        shape: of its weight, [out, in, ...].
        bytes: of its codes.
    """

    name: str
    block: str = ""
    scheme: str
    kernel: str = "QLinearConv"
    shape: tuple[int, ...]
    bytes: int = 0


class BlockEntry(_Frozen):
    """A block and the name of the value that leaves it, [batch, sequence, hidden]."""

    name: str
    output: str


class Manifest(_Frozen):
    """Contents of manifest.json.

    Attributes:
        target: what the file was lowered for.
        kind: "decoder" (prefill and decode with a key/value cache), "encoder" (text to hidden states) or "module" (any
            other graph). "encoder-decoder" and "vision-language" are never in a file: all parts of one, see
            `ExportResult`.
        dtype: dtype of the activations and of the cache.
        provider: execution provider the file was made for.
        session: session config entries the numbers depend on; every session on the file sets them.
        numerics: what changes numerics, in words for people.
        genai_provider_options: provider options of onnxruntime-genai; None: it does not run this target.
        settings: sizes that a decoder's inputs need: num_hidden_layers, num_key_value_heads, head_dim, vocab_size.
            inputs, of encoders and modules: the dimensions of every input, dynamic ones by name.
            past_present_share_buffer (false when absent): past and present may be one buffer of fixed length.
            position_ids (true when absent): the file has this input; otherwise positions count real tokens.
            prompts_from (absent where there is one form for all): new tokens from which a call is a prompt.
            attention (absent in files of others): "grouped" or "standard"; with grouped attention prompts may be padded
            on the left though there is no position_ids.
            form: "qdq" where the file has the operators of ONNX alone, and its opset; absent in native files.
            layer_types (absent where all keep keys and values): of each layer "full_attention", "indexed_attention",
            which also keeps keys of its indexer in past_indexer.{i}, "heavily_compressed_attention" and
            "compressed_sparse_attention", which keep what summaries are made of in past_summed.{i}, "conv", which
            keeps the last conv_cache_size inputs of its convolution in past_conv.{i}, zeros in front of a text,
            "linear_attention", which also keeps the state of a recurrence in past_recurrent.{i}, "hybrid", which keeps
            keys and values and such states, or "none". Several states of a kind are past_conv.{i}.{n}.
            padding_counts (absent where it does not): padding in front changes what a row of the batch gives.
            logits: "last" where they are those of the last token only ([batch, 1, vocab]); absent, of every token.
        bytes: sizes by part; see `lower.sizes.by_part`.
        adapters: names of the adapters that the file can be run with, each in a file of its own, NAME.onnx_adapter.
    """

    format: Literal[1] = FORMAT
    qexport: str = ""
    target: str = Field(min_length=1)
    kind: Kind | Literal["encoder-decoder", "vision-language"]
    dtype: str = "float32"
    provider: str = CPU
    session: dict[str, str] = Field(default_factory=dict)
    numerics: dict[str, Any] = Field(default_factory=dict)
    genai_provider_options: tuple[dict[str, dict[str, str]], ...] | None = ()
    linears: tuple[LinearEntry, ...] = ()
    convolutions: tuple[ConvolutionEntry, ...] = ()
    blocks: tuple[BlockEntry, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)
    bytes: dict[str, int] = Field(default_factory=dict)
    adapters: tuple[str, ...] = ()

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in FLOATS:
            raise ValueError(f"not {', '.join(FLOATS)}")
        return dtype

    @field_validator("settings")
    @classmethod
    def _plausible(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for key in _SIZES.intersection(settings):
            if isinstance(settings[key], bool) or not isinstance(settings[key], int) or settings[key] < 1:
                raise ValueError(f"{key} is not a size: {str(settings[key])[:40]!r}")
        for key, kind in _KINDS.items():
            if not isinstance(settings.get(key, kind()), kind):
                raise ValueError(f"{key} is {str(settings[key])[:40]!r}")
        if not all(isinstance(dims, list | tuple) for dims in settings.get("inputs", {}).values()):
            raise ValueError("inputs are names and their dimensions")
        return settings

    @property
    def readable(self) -> tuple[LinearEntry, ...]:
        """Linears that make a value of their own: not experts that are computed together."""
        return tuple(entry for entry in self.linears if entry.output)


def is_part(manifest: Manifest) -> bool:
    """Whether the file is a part of a model, and runs with the others alone."""
    return "part" in manifest.settings


def save(manifest: Manifest, folder: str | Path) -> Path:
    """Write manifest.json into `folder` and return its path."""
    path = Path(folder) / MANIFEST_FILE
    path.write_text(json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    return path


def load(folder: str | Path) -> Manifest:
    """Read the manifest of an exported folder.

    Raises:
        InputError: the folder is no export, is incomplete, was written by a newer qexport, or its manifest is damaged.
    """
    folder = Path(folder)
    again = "Export the model again"
    check_there(folder)
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise InputError(
            f"not an export of qexport: it has no {MANIFEST_FILE}",
            place=str(folder),
            remedy="Give the folder that `qexport export` wrote",
        )
    data = read_json(path)
    if data.get("kind") == SEQ2SEQ:
        raise InputError(
            "an encoder-decoder, which is two exports", place=str(folder),
            remedy=f"Export, validate, generate and bench take it whole; for the rest give {folder / ENCODER} or "
            f"{folder / DECODER}",
        )  # fmt: skip
    if data.get("kind") == VISION_LANGUAGE:
        raise InputError(
            "a model of pictures and text, which is three exports", place=str(folder),
            remedy="Export, validate and generate take it whole; for the rest give "
            f"{', '.join(str(folder / part) for part in PICTURE_PARTS)}",
        )  # fmt: skip
    if not (folder / MODEL_FILE).is_file():
        raise InputError(f"an incomplete export: {MODEL_FILE} is missing", place=str(folder), remedy=again)
    version = data.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise InputError(
            f"written in format {version} by qexport {data.get('qexport', '?')}; this qexport reads format {FORMAT}",
            place=str(path),
            remedy="Upgrade qexport: pip install -U qexport",
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise InputError(f"damaged manifest: {_first(error)}", place=str(path), remedy=again) from None


def load_any(folder: str | Path) -> Manifest:
    """The manifest of an exported folder, or what `load_genai` makes of a folder that has none.

    Raises: as `load` and `load_genai`.
    """
    folder = Path(folder)
    alone = (folder / GENAI_FILE).is_file() and not (folder / MANIFEST_FILE).is_file()
    return load_genai(folder) if alone else load(folder)


def load_genai(folder: str | Path) -> Manifest:
    """Describe a decoder folder of another tool from its genai_config.json, as far as running it needs.

    Raises:
        InputError: no genai_config.json, or not one of a decoder in a single ONNX file.
    """
    path = Path(folder) / GENAI_FILE
    if not path.is_file():
        raise InputError(
            f"neither {MANIFEST_FILE} nor {GENAI_FILE} found",
            place=str(folder),
            remedy="Give a folder written by `qexport export` or by the model builder of onnxruntime-genai",
        )
    data = read_json(path)
    try:
        decoder, search = data["model"]["decoder"], data.get("search", {})
        options = decoder["session_options"]
        # Only config entries travel: the named options (log_id, custom_ops_library, ...) are not for a stranger's file.
        entries = {k: v for k, v in options.items() if isinstance(v, str) and "." in k}
        named = [name.lower() for group in options.get("provider_options", []) for name in group]
        target, provider = next((pair for pair in _OF_GENAI.items() if pair[0] in named), ("cpu", CPU))
        return Manifest(
            target=target,
            kind="decoder",
            provider=provider,
            session=entries,
            settings={
                "filename": Path(decoder["filename"]).name,
                "num_hidden_layers": decoder["num_hidden_layers"],
                "num_key_value_heads": decoder["num_key_value_heads"],
                "head_dim": decoder["head_size"],
                "vocab_size": data["model"]["vocab_size"],
                "past_present_share_buffer": bool(search.get("past_present_share_buffer", False)),
            },
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"not the genai_config.json of a decoder ({error!r})", place=str(path)) from None
    except ValidationError as error:
        raise InputError(f"unusable genai_config.json: {_first(error)}", place=str(path)) from None


def stated(folder: str | Path) -> dict[str, Any]:
    """What generation_config.json says, and config.json where that does not; nothing that is null.

    Raises:
        InputError: one of them is no JSON object, or names a special token by what is no token id.
    """
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        if path.is_file():
            said = read_json(path)
            check_token_ids(said, path)
            found |= {key: value for key, value in said.items() if value is not None}
    return found


def _first(error: ValidationError) -> str:
    detail = error.errors()[0]
    return f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}"
