"""Small random models of pictures and text with their processors, and pictures for them."""

from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from helpers.random_decoders import LISTS, save_random
from qexport.calibrate.pictures import drawn_picture

KINDS = tuple(LISTS["vision_language"])
QUICK = ("llava",)
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
)
_SPECIAL = ("<pad>", "<s>", "</s>")


def save_pictures_model(kind: str, folder: Path, *, processor: bool = True) -> Path:
    """Save a random model of a kind with, for LLaVA, its processor; 128 tokens, the last stands for pictures."""
    save_random(LISTS["vision_language"][kind], folder, AutoModelForImageTextToText)
    if processor:
        save_llava_processor(folder)
    return folder


def picture_tokenizer(special: tuple[str, ...] = ("<image>",), size: int = 128) -> PreTrainedTokenizerFast:
    """A tokenizer of characters whose last tokens are these special ones."""
    letters = ["Ġ", *(chr(code) for code in range(33, 127))]
    words = [*_SPECIAL, *letters]
    tokens = [*words, *(f"<{i}>" for i in range(size - len(words) - len(special))), *special]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    pad, bos, eos = _SPECIAL
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, bos_token=bos, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def save_llava_processor(folder: Path) -> None:
    """The processor of pictures of 32 pixels in patches of 8, with its tokenizer and chat template."""
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        image_processor=pictures, tokenizer=picture_tokenizer(), patch_size=8, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip


def picture_file(folder: Path, seed: int = 0) -> Path:
    """A drawn picture as a PNG file."""
    path = folder / f"picture_{seed}.png"
    Image.fromarray(drawn_picture(seed, 48, 64)).save(path)
    return path
