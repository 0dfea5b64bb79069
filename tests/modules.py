"""Small random models that are no decoders: text encoders as folders, vision models and modules of one's own."""

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModel

from models import randomize

VOCAB, HIDDEN = 128, 64
_SIZES = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
_VISION = dict(
    hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=16, patch_size=4
)

# What each family is here for stands beside it.
ENCODERS = {
    "bert": lambda: transformers.BertConfig(**_SIZES),  # segments, a pooler
    "roberta": lambda: transformers.RobertaConfig(  # positions count from behind the padding token
        **_SIZES | dict(pad_token_id=1), type_vocab_size=1
    ),
    "distilbert": lambda: transformers.DistilBertConfig(  # no segments, no pooler
        vocab_size=VOCAB, dim=HIDDEN, n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=64
    ),
    "mpnet": lambda: transformers.MPNetConfig(**_SIZES | dict(pad_token_id=1)),  # relative positions
    "albert": lambda: transformers.AlbertConfig(**_SIZES, embedding_size=32),  # one layer for all
    "modernbert": lambda: transformers.ModernBertConfig(  # rotary positions, windows, gated
        **_SIZES, local_attention=4, global_attn_every_n_layers=2, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2,
    ),
    "deberta": lambda: transformers.DebertaV2Config(**_SIZES),  # attention of its own
}  # fmt: skip


def save_encoder(family: str, folder: Path, *, seed: int = 0, **changes) -> Path:
    """Save a random encoder as config.json and model.safetensors.

    Args:
        changes: of its config.
    """
    config = ENCODERS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModel.from_config(config)
    randomize(model, seed)
    model.save_pretrained(folder)
    return folder


def vit() -> nn.Module:
    return _random(transformers.ViTModel(transformers.ViTConfig(**_VISION)))


def clip() -> nn.Module:
    text = _SIZES | dict(projection_dim=32, bos_token_id=1, eos_token_id=2)
    return _random(transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=_VISION | dict(projection_dim=32), projection_dim=32
    )))  # fmt: skip


def t5() -> nn.Module:
    """Encoder and decoder in one call, without a cache."""
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=16, d_ff=96, num_layers=1, num_heads=4, use_cache=False
    )
    return _random(transformers.T5ForConditionalGeneration(config))


def whisper() -> nn.Module:
    """The same, of spectra [batch, 16, 32], which convolutions along time read first."""
    config = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=16, max_source_positions=16,
        pad_token_id=1, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False,
    )  # fmt: skip
    return _random(transformers.WhisperForConditionalGeneration(config))


def _random(model: nn.Module) -> nn.Module:
    """Weights under which every part matters; see `models.randomize`."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=random)
            if parameter.dim() >= 2:
                parameter.copy_(drawn / parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.2 * drawn)
            elif parameter.dim():
                parameter.copy_(0.3 * drawn)
    return model.eval()


class Residual(nn.Module):
    """A depthwise block as mobile networks have them."""

    def __init__(self, channels: int):
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.deep = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.deep(self.act(self.norm(self.wide(x)))) + x)


class SmallCNN(nn.Module):
    """Images of any size to 10 numbers."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(2)
        self.layers = nn.Sequential(Residual(channels), Residual(channels))
        self.last = nn.Conv2d(channels, 2 * channels, 1)
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, image):
        x = self.layers(self.pool(torch.relu(self.norm(self.stem(image)))))
        return self.head(torch.nn.functional.relu6(self.last(x)).mean((2, 3)))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = SmallCNN().train()
    for _ in range(10):  # statistics of the batch norms
        model(torch.randn(8, 3, 16, 16))
    return model.eval()


def save_seq2seq(family: str, folder: Path, *, seed: int = 0, gain: float = 1.0) -> Path:
    """A small random encoder-decoder of a family; gain: of every matrix, above 1 for texts of more than one word."""
    model = SEQ2SEQ[family]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0, gain * parameter.shape[-1] ** -0.5, generator=generator)
    model.save_pretrained(folder)
    return folder


def _layers(**changes):
    """Sizes under the names that most configs have for them."""
    return {
        "vocab_size": VOCAB, "d_model": HIDDEN, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None, **changes,
    }  # fmt: skip


def _t5(**changes):
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=16, d_ff=96, num_layers=1, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0, eos_token_id=2, **changes,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


SEQ2SEQ = {
    "t5": _t5,
    "t5_gated": lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**_layers(max_position_embeddings=64))
    ),
    "marian": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(**_layers(max_position_embeddings=64, share_encoder_decoder_embeddings=True))
    ),
    "m2m_100": lambda: transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(**_layers(max_position_embeddings=64))
    ),
    "pegasus": lambda: transformers.PegasusForConditionalGeneration(
        transformers.PegasusConfig(**_layers(max_position_embeddings=64))
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **_layers(
                num_mel_bins=16, max_source_positions=16, max_target_positions=64, suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        )
    ),
}  # fmt: skip
