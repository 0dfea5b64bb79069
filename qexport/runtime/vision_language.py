"""An exported model of pictures and text: pictures are read once, then the decoder writes with its cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..artifact import manifest as manifests
from ..artifact.cache_names import TOKEN_IDS
from ..artifact.files import read_json
from ..artifact.manifest import DECODER, EMBEDDING, ENCODER, MANIFEST_FILE, VISION, VISION_LANGUAGE
from ..artifact.output import restore
from ..artifact.picture_positions import picture_positions
from ..errors import InputError, RuntimeProblem, reading
from .decoder import Decoder, open_decoder
from .embeddings import Embeds
from .padded_pictures import Padded, padded_of
from .provider import device_of
from .session import open_session
from .values import value_of

FEATURES, _MASK = "image_features", "pixel_attention_mask"
_PIXELS = "pixel_values"  # what the encoder of an encoder-decoder reads


def is_vision_language(folder: str | Path) -> bool:
    """Whether a folder is an export of a model of pictures and text, in three parts."""
    restore(Path(folder))
    path = Path(folder) / MANIFEST_FILE
    return path.is_file() and read_json(path).get("kind") == VISION_LANGUAGE


class PicturesAndText(Embeds):
    """The sessions of the first two parts: what they make of pictures and tokens is what the decoder reads.

    Attributes:
        inputs: names and types of what the encoder of pictures reads.
        token: the id that stands for a row of its features in a prompt.

    Args:
        vision, embedding: sessions on these parts.
        token: see above.
        grid: of a model whose tokens of pictures have places in height and width, the name of the encoder's input that
            says how many patches there are; merged: patches of one such token along each side.
        prefix: of a model that reads prompts in both directions, the name of the decoder's input that says which tokens
            are no prompt. A prompt is what a call on an empty cache reads.
        padded: of a model whose pictures are padded to one size, which of the encoder's rows are theirs.
    """

    def __init__(
        self, vision: ort.InferenceSession, embedding: ort.InferenceSession, token: int, grid: str | None = None,
        merged: int = 1, prefix: str | None = None, padded: Padded | None = None,
    ):  # fmt: skip
        self._vision, self._embedding, self.token, self._prefix = vision, embedding, token, prefix
        self._grid, self._merged, self._padded = grid, merged, padded
        self._device = device_of(vision)
        self.inputs = {value.name: value.type for value in vision.get_inputs()}
        self._sizes = {value.name: value.shape for value in vision.get_inputs()}
        self._types = {value.name: value.type for value in embedding.get_inputs()}
        self._width = int(next(value.shape[-1] for value in embedding.get_inputs() if value.name == FEATURES))
        told = [] if prefix is None else [prefix]
        self.makes = frozenset([*told, *(value.name for value in embedding.get_outputs())])
        self.forget()

    def forget(self) -> None:
        """Read no pictures any more."""
        self._features = value_of(np.zeros((0, self._width), np.float32), self._types[FEATURES])
        self._rows, self._grids = 0, np.zeros((0, 3), np.int64)
        self._later = np.zeros((1, 1), np.int64)  # how much further on a row's next token is than tokens are in it

    def read(self, pictures: Mapping[str, np.ndarray]) -> int:
        """Read pictures, those of the first row of a batch first; the next prompt is about them.

        Args:
            pictures: by name of the encoder's inputs, as the model's processor makes them.

        Returns:
            rows that the encoder makes of them, each of which a token of the prompt stands for; those that it makes of
            padding come behind and are not counted.

        Raises:
            InputError: other inputs than these.
            RuntimeProblem: ONNX Runtime fails.
        """
        if self.inputs.keys() != pictures.keys():
            raise InputError(
                f"the pictures have {', '.join(pictures)}, but the encoder reads {', '.join(self.inputs)}",
                place="images", remedy="Give what the model's processor makes",
            )  # fmt: skip
        given = {name: value_of(array, self.inputs[name]) for name, array in pictures.items()}
        self._features = _run(self._vision, given, self._device, "the encoder of pictures")[FEATURES]
        self._rows = self._features.shape()[0]
        if self._padded is not None:
            self._rows = self._padded.rows(pictures)
        if self._grid is not None:
            self._grids = np.asarray(pictures[self._grid])
        return self._rows

    def any_pictures(self, count: int) -> dict[str, np.ndarray]:
        """Pictures of random numbers, to measure speed with; of those of any size, of 16 tokens along each side."""
        random, side = np.random.default_rng(0), 16 * self._merged
        found = {}
        for name, dims in self._sizes.items():
            if self._padded is not None:
                found[name] = self._padded.example(name, dims, count, random)
            elif name == self._grid:
                found[name] = np.array([[1, side, side]] * count, np.int64)
            else:
                rows = count if self._grid is None else count * side * side
                found[name] = random.standard_normal((rows, *dims[1:])).astype(np.float32)
        return found

    def __call__(self, ids: np.ndarray, positions: np.ndarray) -> Mapping[str, ort.OrtValue]:
        stand, rows = int((ids == self.token).sum()), 0 if positions.all() else self._rows  # all of them in the prompt
        if stand != rows:
            raise InputError(
                f"{stand} of its tokens stand for pictures, but the encoder made {rows} rows", place="prompt",
                remedy="Give its pictures, all in one prompt, and tokens as the processor makes them",
            )  # fmt: skip
        given = {TOKEN_IDS: value_of(ids, self._types[TOKEN_IDS]), FEATURES: self._features}
        made = _run(self._embedding, given, self._device, "the embedding")
        if self._prefix is not None:
            made[self._prefix] = value_of(np.full(ids.shape, int(positions.all()), np.int64), "tensor(int64)")
        return {**made, **self._places(ids, positions)}

    def _places(self, ids: np.ndarray, positions: np.ndarray) -> dict[str, ort.OrtValue]:
        """Where the tokens are, of a model in which pictures have a height and a width."""
        if self._grid is None:
            return {}
        if positions.all():  # behind a prompt
            places = np.tile(positions + self._later, (3, 1, 1))
        elif self._rows:
            places = picture_positions(ids, self.token, self._grids.tolist(), self._merged)
            self._later = places.max(axis=(0, 2))[:, None] - positions[:, -1:]
        else:
            places, self._later = np.tile(positions, (3, 1, 1)), np.zeros((1, 1), np.int64)
        return {"position_ids": value_of(places, "tensor(int64)")}


def _run(
    session: ort.InferenceSession, given: Mapping[str, ort.OrtValue], device: str, what: str
) -> dict[str, ort.OrtValue]:
    """All outputs of a session by name, where it makes them."""
    binding, names = session.io_binding(), [value.name for value in session.get_outputs()]
    for name, value in given.items():
        binding.bind_ortvalue_input(name, value)
    for name in names:
        binding.bind_output(name, device)
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime has one exception class for each status code and no base class
        raise RuntimeProblem(f"{what} failed: {error}") from error
    return dict(zip(names, binding.get_outputs(), strict=True))


def open_vision_language(
    folder: str | Path, *, threads: int | None = None, provider: str | None = None, max_length: int = 2048
) -> tuple[PicturesAndText, Decoder]:
    """Open an export of a model of pictures and text: what reads, and what writes about it.

    Args:
        max_length: bounds a shared cache.

    Raises:
        InputError: it is none. Otherwise as `open_session`.
    """
    reader = open_reader(folder, threads=threads, provider=provider)
    decoder = open_decoder(
        Path(folder) / DECODER, threads=threads, provider=provider, max_length=max_length, embed=reader
    )  # fmt: skip
    return reader, decoder


def open_reader(folder: str | Path, *, threads: int | None = None, provider: str | None = None) -> PicturesAndText:
    """Open what reads alone.

    Raises: as `open_vision_language`.
    """
    folder = Path(folder)
    if not is_vision_language(folder):
        raise InputError("is not an export of a model of pictures and text", place=str(folder))
    vision, embedding = (
        open_session(part, manifests.load(part), threads=threads, provider=provider)
        for part in (folder / VISION, folder / EMBEDDING)
    )
    return reader_of(folder, vision, embedding)


def reader_of(folder: Path, vision: ort.InferenceSession, embedding: ort.InferenceSession) -> PicturesAndText:
    """What reads, of sessions on the first two parts and what an export says of its tokens.

    Raises:
        InputError: it does not say them.
    """
    about = read_json(folder / MANIFEST_FILE)
    return PicturesAndText(
        vision, embedding, stated_token(about, folder), about.get("grid"), about.get("spatial_merge_size", 1),
        about.get("prefix"), padded_of(about),
    )  # fmt: skip


def stated_token(about: Mapping[str, Any], folder: Path) -> int:
    """The id that stands for a row of features, by the manifest of all parts.

    Raises:
        InputError: it says none.
    """
    token = about.get("image_token_id")
    if not isinstance(token, int) or isinstance(token, bool) or token < 0:
        raise InputError("names no image_token_id", place=str(folder / MANIFEST_FILE), remedy="Export the model again")
    return token


def open_processor(folder: Path) -> Any:
    """What makes tokens and arrays of prompts with pictures: transformers' own, from the configs in a folder.

    Raises:
        InputError: there is none that can be used.
    """
    from transformers import AutoProcessor

    remedy = "Copy the model's processor_config.json, preprocessor_config.json and tokenizer files into it"
    with reading(folder, "no usable processor of pictures", remedy):
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not hasattr(processor, "image_processor"):
        raise InputError("has no processor of pictures", place=str(folder), remedy=remedy)
    return processor


def opened_pictures(images: Sequence[Any]) -> list[Any]:
    """Pictures in RGB, those named by a path read.

    Raises:
        InputError: one cannot be read.
    """
    try:
        from PIL import Image
    except ImportError:
        raise InputError("reading pictures needs Pillow", place="images", remedy="pip install pillow") from None
    found = []
    for image in images:
        if isinstance(image, (str, Path)):
            try:
                with Image.open(image) as file:
                    image = file.convert("RGB")
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise InputError(
                    f"cannot be read as a picture ({str(error).splitlines()[0]})", place=str(image),
                    remedy="Give a PNG or JPEG file",
                ) from None  # fmt: skip
        found.append(image)
    return found


def pictures_as_source(folder: Path, images: Sequence[Any]) -> dict[str, np.ndarray]:
    """What the encoder of an encoder-decoder reads of pictures, a row for each, as the model's processor makes it.

    Args:
        images: paths, pictures of Pillow, or arrays uint8 [height, width, 3].

    Raises:
        InputError: it reads something else, a picture cannot be read, or there is no processor that can be used.
    """
    from transformers import AutoImageProcessor

    read = list(manifests.load(folder / ENCODER).settings.get("inputs", {}))
    if read != [_PIXELS]:
        raise InputError(f"its encoder reads {', '.join(read)}, not pictures", place="images", remedy="Leave them out")
    pictures = opened_pictures(images)
    with reading(folder, "no usable processor of pictures", "Copy the model's preprocessor_config.json into it"):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return {_PIXELS: np.asarray(processor(pictures, return_tensors="np")[_PIXELS], np.float32)}


def prompt_of(
    processor: Any, prompt: str, images: Sequence[Any], folder: Path, *, special: bool
) -> tuple[list[int], dict[str, np.ndarray]]:
    """Token ids of a prompt and what the encoder reads of its pictures, as the model's processor makes both.

    Args:
        prompt: pictures that no token of it stands for come first.
        images: paths, pictures of Pillow, or arrays uint8 [height, width, 3].
        special: whether tokens are added that begin and end texts.

    Raises:
        InputError: a picture cannot be read, or the processor refuses them.
    """
    sizes = manifests.load(folder / VISION).settings["inputs"]
    pictures, stand = opened_pictures(images), str(processor.image_token)
    missing = len(pictures) - prompt.count(stand)
    if missing < 0:
        raise InputError(
            f"{prompt.count(stand)} places for pictures, but {len(pictures)} pictures", place="prompt",
            remedy="Give a picture for each",
        )  # fmt: skip
    with reading(folder, "its processor cannot read the prompt and its pictures", "Look at what the model expects"):
        made = processor(
            text=[stand * missing + prompt], images=[pictures], add_special_tokens=special, return_tensors="np"
        )
    absent = [name for name in sizes if name not in made]
    if absent:
        raise InputError(
            f"its processor makes no {absent[0]}, which the encoder reads", place=str(folder),
            remedy="Copy the processor's configs of the model that was exported into it",
        )  # fmt: skip
    found = {name: np.asarray(made[name]) for name in sizes}
    found = {n: array.reshape(-1, *array.shape[array.ndim - len(sizes[n]) + 1 :]) for n, array in found.items()}
    mask = None if _MASK in found else made.get(_MASK)  # which an encoder reads or does not
    if mask is not None and len(next(iter(found.values()))):
        found = whole_tiles(found, np.asarray(mask), folder)
    return [int(token) for token in np.asarray(made["input_ids"])[0]], found


def whole_tiles(pictures: Mapping[str, np.ndarray], mask: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """Pictures [tiles, ...] without tiles that are padding alone.

    Args:
        mask: [..., height, width], 0 for padding.

    Raises:
        InputError: a tile is padded in part, which the encoder reads as a picture.
    """
    tiles = mask.reshape(-1, *mask.shape[-2:]) != 0
    there, whole = tiles.any(axis=(1, 2)), tiles.all(axis=(1, 2))
    if (there != whole).any():
        raise InputError(
            "its processor pads a picture, but the encoder reads whole ones", place=str(folder),
            remedy="Let it cut pictures into tiles (do_image_splitting), or give a square one",
        )  # fmt: skip
    return {name: array[there] for name, array in pictures.items()}
