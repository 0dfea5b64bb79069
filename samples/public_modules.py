"""Public modules of PyPI as files in 8 bits: which are captured, exported, and computed alike, and why others are not.

    python samples/public_modules.py [--only NAME ...] [--out samples/results/public_modules.md]

Packages are fetched by pip into a temporary folder for this run, and weights are random: what counts is whether the
file computes what the module does. Each is captured, compared with its own forward on two batches, exported as
`w8a8_dyn`, and its file compared with its quantized graph.
"""

import argparse
import contextlib
import copy
import importlib
import io
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import exports  # noqa: E402
from helpers.runners import captured_runner, load_weights  # noqa: E402
from qexport.capture.module import capture_module, named_inputs  # noqa: E402
from qexport.errors import QExportError  # noqa: E402
from qexport.recipe.recipe import Recipe  # noqa: E402

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
PACKAGES = (
    "torchvision==0.28.0", "timm", "torchaudio", "segmentation-models-pytorch", "efficientnet-pytorch",
    "facenet-pytorch", "conformer", "encodec", "vit-pytorch", "x-transformers", "einops", "einx", "torch-einops-utils",
    "loguru", "frozendict", "vocos", "openunmix", "denoiser", "snac", "pytorch-tabnet", "kornia", "kornia-rs", "scipy",
    "lpips",
)  # fmt: skip
RECIPE = Recipe(scheme="w8a8_dyn", weights={"method": "rtn"})
SECONDS = 240  # for one module


def image(side: int = 64, channels: int = 3) -> tuple[torch.Tensor, ...]:
    return (torch.rand(2, channels, side, side),)


def wave(samples: int = 8000) -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 1, samples) / 4,)


def _of(package: str, name: str, **options) -> Callable[[], nn.Module]:
    """A function of a package that makes a module."""
    return lambda: getattr(importlib.import_module(package), name)(**options)


def of_any_lengths(**options) -> nn.Module:
    """torchaudio's Conformer, whose padding mask is as long as the input: its own is as long as the longest length."""
    conformer = importlib.import_module("torchaudio.models").Conformer

    class OfAnyLengths(conformer):  # type: ignore[misc, valid-type]  # a class of a package that is fetched
        def forward(self, input: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, padding = input.transpose(0, 1), torch.arange(input.shape[1]) >= lengths[:, None]
            for layer in self.conformer_layers:
                x = layer(x, padding)
            return x.transpose(0, 1), lengths

    return OfAnyLengths(**options)


def _vision(name: str, **options) -> Callable[[], nn.Module]:
    return _of("torchvision.models", name, weights=None, **options)


def _timm(name: str, **options) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name, pretrained=False, **options)


def _transformers(model: str, config: str, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**options))

    return make


_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_CONVOLUTIONS = {"conv_dim": (32, 32, 32), "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 4)}
_SPEECH = {**_SMALL, **_CONVOLUTIONS, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
# By name: how it is made, and its inputs.
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    **{
        f"torchvision {name}": (_vision(name), image)
        for name in (
            "resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "swin_t", "swin_v2_t",
            "regnet_y_400mf", "densenet121", "shufflenet_v2_x0_5", "mnasnet0_5", "squeezenet1_1", "googlenet",
        )
    },
    "torchvision vit_b_16": (_vision("vit_b_16"), lambda: image(224)),
    "torchvision vgg11_bn": (_vision("vgg11_bn"), image),
    "torchvision inception_v3": (_vision("inception_v3", init_weights=False), lambda: image(96)),
    "torchvision lraspp": (
        _of("torchvision.models.segmentation", "lraspp_mobilenet_v3_large", weights=None, weights_backbone=None), image,
    ),
    "torchvision deeplabv3": (
        _of("torchvision.models.segmentation", "deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None),
        image,
    ),
    "torchvision r3d_18": (
        _of("torchvision.models.video", "r3d_18", weights=None), lambda: (torch.rand(2, 3, 4, 32, 32),),
    ),
    "torchvision fasterrcnn": (
        _of("torchvision.models.detection", "fasterrcnn_mobilenet_v3_large_320_fpn", weights=None,
            weights_backbone=None), image,
    ),
    **{
        f"timm {name}": (_timm(name), lambda: image(224))
        for name in ("deit_tiny_patch16_224", "levit_128s", "mixer_s32_224", "xcit_nano_12_p16_224", "coat_tiny")
    },
    **{
        f"timm {name}": (_timm(name), image)
        for name in (
            "mobilevit_xxs", "ghostnet_100", "hrnet_w18_small", "poolformer_s12", "edgenext_xx_small", "fastvit_t8",
            "repvgg_a0", "res2net50_26w_4s", "tf_efficientnetv2_b0", "regnetz_005",
        )
    },
    **{
        f"segmentation_models_pytorch {name}": (
            _of("segmentation_models_pytorch", name, encoder_name="resnet18", encoder_weights=None), image,
        )
        for name in ("Unet", "FPN", "DeepLabV3Plus")
    },
    "efficientnet_pytorch b0": (
        lambda: importlib.import_module("efficientnet_pytorch").EfficientNet.from_name("efficientnet-b0"), image,
    ),
    "facenet_pytorch InceptionResnetV1": (_of("facenet_pytorch", "InceptionResnetV1"), lambda: image(96)),
    "vit_pytorch CaiT": (
        _of("vit_pytorch.cait", "CaiT", image_size=64, patch_size=16, num_classes=10, dim=64, depth=2, cls_depth=1,
            heads=4, mlp_dim=128), image,
    ),
    "vit_pytorch SimpleViT": (
        _of("vit_pytorch.simple_vit", "SimpleViT", image_size=64, patch_size=16, num_classes=10, dim=64, depth=2,
            heads=4, mlp_dim=128), image,
    ),
    "x_transformers ViT": (
        lambda: (x := importlib.import_module("x_transformers")).ViTransformerWrapper(
            image_size=64, patch_size=16, num_classes=10, attn_layers=x.Encoder(dim=64, depth=2, heads=4)
        ), image,
    ),
    "lpips alex": (
        _of("lpips", "LPIPS", net="alex", pretrained=False, pnet_rand=True, verbose=False),
        lambda: (*image(), *image()),
    ),
    "kornia HardNet": (_of("kornia.feature", "HardNet", pretrained=False), lambda: image(32, 1)),
    "conformer Conformer": (_of("conformer", "Conformer", dim=64, depth=2, heads=4, dim_head=16),
                            lambda: (torch.randn(2, 50, 64),)),
    "encodec encoder": (
        lambda: importlib.import_module("encodec.modules").SEANetEncoder(channels=1, dimension=32, n_filters=8), wave,
    ),
    "encodec decoder": (
        lambda: importlib.import_module("encodec.modules").SEANetDecoder(channels=1, dimension=32, n_filters=8),
        lambda: (torch.randn(2, 32, 20),),
    ),
    "snac SNAC": (
        _of("snac", "SNAC", sampling_rate=24000, encoder_dim=16, encoder_rates=[2, 4, 4], decoder_dim=64,
            decoder_rates=[4, 4, 2], attn_window_size=None, codebook_size=32, codebook_dim=8, vq_strides=[2, 1],
            noise=False), wave,
    ),
    "denoiser Demucs": (_of("denoiser.demucs", "Demucs", hidden=16, depth=3), wave),
    "openunmix OpenUnmix": (
        _of("openunmix.model", "OpenUnmix", nb_bins=129, nb_channels=2, hidden_size=64),
        lambda: (torch.rand(2, 2, 129, 20),),
    ),
    "vocos backbone": (
        _of("vocos.models", "VocosBackbone", input_channels=40, dim=64, intermediate_dim=128, num_layers=2),
        lambda: (torch.randn(2, 40, 30),),
    ),
    "pytorch_tabnet TabNet": (
        lambda: importlib.import_module("pytorch_tabnet.tab_network").TabNetNoEmbeddings(16, 4),
        lambda: (torch.randn(8, 16),),
    ),
    "torchaudio Conformer": (
        _of("torchaudio.models", "Conformer", input_dim=64, num_heads=4, ffn_dim=128, num_layers=2,
            depthwise_conv_kernel_size=15), lambda: (torch.randn(2, 40, 64), torch.tensor([40, 30])),
    ),
    "torchaudio Conformer, its mask as long as its input": (
        lambda: of_any_lengths(input_dim=64, num_heads=4, ffn_dim=128, num_layers=2, depthwise_conv_kernel_size=15),
        lambda: (torch.randn(2, 40, 64), torch.tensor([40, 30])),
    ),
    "torchaudio ConvTasNet": (_of("torchaudio.models", "ConvTasNet", msk_num_layers=3, msk_num_stacks=2), wave),
    "torchaudio DeepSpeech": (_of("torchaudio.models", "DeepSpeech", n_feature=40, n_hidden=64),
                              lambda: (torch.randn(2, 1, 30, 40),)),
    "torchaudio Wav2Letter": (
        _of("torchaudio.models", "Wav2Letter", num_classes=20, input_type="mfcc", num_features=13),
        lambda: (torch.randn(2, 13, 100),),
    ),
    "torchaudio Wav2Vec2": (
        _of("torchaudio.models", "wav2vec2_model", extractor_mode="group_norm",
            extractor_conv_layer_config=[(32, 10, 5), (32, 8, 4)], extractor_conv_bias=False, encoder_embed_dim=64,
            encoder_projection_dropout=0.0, encoder_pos_conv_kernel=16, encoder_pos_conv_groups=4, encoder_num_layers=2,
            encoder_num_heads=4, encoder_attention_dropout=0.0, encoder_ff_interm_features=128,
            encoder_ff_interm_dropout=0.0, encoder_dropout=0.0, encoder_layer_norm_first=False,
            encoder_layer_drop=0.0, aux_num_out=None), lambda: (torch.randn(2, 4000),),
    ),
    "torchaudio WaveRNN": (
        _of("torchaudio.models", "WaveRNN", upsample_scales=[2, 2], n_classes=32, hop_length=4, n_rnn=64, n_fc=64,
            n_freq=16), lambda: (torch.randn(2, 1, 16), torch.randn(2, 1, 16, 8)),
    ),
    "torchaudio MelSpectrogram": (_of("torchaudio.transforms", "MelSpectrogram"), lambda: (torch.randn(2, 4000),)),
    "transformers Dinov2": (_transformers("Dinov2Model", "Dinov2Config", image_size=64, patch_size=16,
                                          hidden_size=64, num_hidden_layers=2, num_attention_heads=4), image),
    "transformers Segformer": (
        _transformers("SegformerForSemanticSegmentation", "SegformerConfig", depths=[1, 1, 1, 1],
                      hidden_sizes=[16, 32, 48, 64], decoder_hidden_size=32), image,
    ),
    "transformers AST": (
        _transformers("ASTModel", "ASTConfig", max_length=64, num_mel_bins=32, **_SMALL),
        lambda: (torch.randn(2, 64, 32),),
    ),
    "transformers PatchTST": (
        _transformers("PatchTSTForPrediction", "PatchTSTConfig", num_input_channels=3, context_length=64,
                      prediction_length=8, d_model=32, num_hidden_layers=2), lambda: (torch.randn(2, 64, 3),),
    ),
    "transformers HuBERT": (_transformers("HubertModel", "HubertConfig", **_SPEECH), lambda: (torch.randn(2, 4000),)),
    "transformers Swin2SR": (
        _transformers("Swin2SRForImageSuperResolution", "Swin2SRConfig", image_size=32, embed_dim=24, depths=[2, 2],
                      num_heads=[2, 2], window_size=8), lambda: image(32),
    ),
    "transformers DPT": (
        _transformers("DPTForDepthEstimation", "DPTConfig", image_size=64, patch_size=16,
                      backbone_out_indices=[0, 1, 2, 3],
                      neck_hidden_sizes=[16, 16, 16, 16], fusion_hidden_size=16,
                      **{**_SMALL, "num_hidden_layers": 4}),
        image,
    ),
    "transformers DETR": (
        _transformers("DetrForObjectDetection", "DetrConfig", use_timm_backbone=False, use_pretrained_backbone=False,
                      d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
                      num_queries=8), image,
    ),
}  # fmt: skip


def fetch(folder: Path) -> None:
    """The packages, without what they require: constraints name the versions of what is there already.

    The compiled parts of torchvision and torchaudio on PyPI want CUDA's libraries, and the modules here do without.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps"]
    subprocess.run([*pip, "--target", folder, "-c", str(CONSTRAINTS), *PACKAGES], check=True)
    shutil.rmtree(folder / "torchaudio" / "lib", ignore_errors=True)
    sys.path.append(str(folder))


def stand_in_for_compiled_parts() -> torch.library.Library:
    """What torchvision describes the shapes of when it is imported."""
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def row(name: str, folder: Path) -> str:
    """The line of a module."""
    make, inputs = MODULES[name]
    torch.manual_seed(0)
    cells = ["", "", "", ""]
    try:
        given = inputs()
        model = settled(make(), given)
        named = named_inputs(model, given)
        axes = {key: {0: "batch"} for key in named}
        captured = capture_module(model, named, axes)
        run = captured_runner(load_weights(copy.deepcopy(captured)))
        more = {key: torch.cat([value, value.flip(0)[:1]]) for key, value in named.items()}
        cells[0] = f"{max(_from_eager(model, run, feeds) for feeds in (named, more)):.0e}"
        made = exports.export(captured, RECIPE, "cpu", folder / "out", calibration=[named], overwrite=True)
        cells[1] = str(len(made.manifest.linears))
        cells[2] = _agreement(made, more)
    except Exception as error:  # modules of other people raise anything
        cells[3] = _sentence(error)
    return f"| {name} | {' | '.join(cells)} |"


def settled(model: nn.Module, given: tuple[torch.Tensor, ...]) -> nn.Module:
    """A module whose norms know the statistics of its values, and whose result is not 0 from the start."""
    with torch.no_grad(), contextlib.suppress(Exception):
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.momentum = 1.0
        model.train()(*given)
    return model.eval()


def _from_eager(model: nn.Module, run, feeds: dict[str, torch.Tensor]) -> float:
    """The largest difference of the captured graph's outputs to the module's, of each output's largest element."""
    got = list(run(feeds).values())
    with torch.no_grad():
        wanted = [value for value in _tensors(model(**feeds)) if isinstance(value, torch.Tensor)]
    pairs = [(a.float(), b.float()) for a, b in zip(wanted, got, strict=True)]
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs)


def _tensors(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value]


def _agreement(made: exports.Exported, feeds: dict[str, torch.Tensor]) -> str:
    """The least cosine of an output of the file to the quantized graph's."""
    want, got = made.in_pytorch()(feeds), made.in_onnxruntime()(feeds)
    pairs = [(want[key].double().flatten(), got[key].double().flatten()) for key in got]
    return f"{min(float(a @ b / (a.norm() * b.norm())) for a, b in pairs):.5f}"


def _sentence(error: Exception) -> str:
    text = error.message if isinstance(error, QExportError) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split()).replace("|", "/").replace(f"{sys.path[-1]}/", "")  # where the packages are
    return text if len(text) <= 240 else f"{text[:240]} ..."


def _too_long(*_) -> None:
    raise TimeoutError(f"takes more than {SECONDS} seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(MODULES), help="of these modules alone")
    parser.add_argument("--packages", type=Path, help="a folder that has them already")
    parser.add_argument("--out", type=Path, help="write the table there")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _too_long)
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.packages:
            sys.path.append(str(given.packages))
        else:
            fetch(folder / "packages")
        kept = stand_in_for_compiled_parts()
        for module in given.only:
            signal.alarm(SECONDS)
            with contextlib.redirect_stdout(io.StringIO()):
                lines.append(row(module, folder))
            signal.alarm(0)
            print(lines[-1], flush=True)
        del kept
    good = sum(line.endswith("|  |") for line in lines)
    if given.out:
        head = [
            "# Public modules", "", "Made by `python samples/public_modules.py`.", "",
            f"{good} of {len(lines)} modules of PyPI, with random weights, become files in `w8a8_dyn`. The difference",
            "of the captured graph to the module's forward is a share of the outputs' largest element, on two batches;",
            "the cosine is that of the file in ONNX Runtime to the quantized graph in PyTorch.", "",
            "| module | from eager | quantized linears | file to graph | why not |", "| --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        given.out.write_text("\n".join([*head, *lines, ""]))


if __name__ == "__main__":
    main()
