"""Files of any module by other tools: convolutions and linears are found, and what is planted in one is named first."""

import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import qexport
from helpers import foreign_files as files
from qexport.errors import InputError

LINEARS = ["features.0", "features.3", "features.6", "features.8", "head.0", "head.2"]


class Net(nn.Module):
    """Plain, strided, depthwise and pointwise convolutions, batch norms, and a head."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=16, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.Hardswish(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, image):
        return self.head(self.features(image).mean((2, 3)))


def images(count=8, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for seed in range(8):
            model(images(16, seed))
    return model.eval()


@pytest.fixture(scope="module")
def made(net, tmp_path_factory):
    """By name: what torch.onnx writes, batch norms folded and not, and what ONNX Runtime's quantizers make of it."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter([{"image": images(8, seed).numpy()} for seed in range(4)])

        def get_next(self):
            return next(self.left, None)

    root, ports = tmp_path_factory.mktemp("cnn"), {"input_names": ["image"], "output_names": ["scores"]}
    free = {"dynamic_axes": {"image": {0: "n"}, "scores": {0: "n"}}, "dynamo": False}
    before, logging.root.manager.disable = logging.root.manager.disable, logging.WARNING
    for name in ("float", "norms", "qdq", "operators", "dynamic"):
        (root / name).mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (images(),), str(root / "float/model.onnx"), **ports, **free)
        torch.onnx.export(
            net, (images(),), str(root / "norms/model.onnx"), **ports, **free, do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )  # fmt: skip
    source = root / "float/model.onnx"
    quantize_static(source, root / "qdq/model.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    quantize_static(source, root / "operators/model.onnx", Reader(), quant_format=QuantFormat.QOperator)
    quantize_dynamic(source, root / "dynamic/model.onnx")
    logging.root.manager.disable = before
    return root


def validate(place, net, **options):
    return qexport.validate(place, net, inputs=[(images(seed=50),), (images(seed=51),)], **options)


KERNELS = {  # the operators that convolutions and linears become, and the least SQNR of one by itself
    "float": (set(), 120), "norms": (set(), 120), "qdq": ({"QLinearConv", "QGemm"}, 35),
    "operators": ({"QLinearConv", "QGemm"}, 35), "dynamic": ({"ConvInteger", "DynamicQuantizeMatMul"}, 35),
}  # fmt: skip


@pytest.mark.by_default("qdq", "operators")
@pytest.mark.parametrize("form", KERNELS)
def test_good_files_have_no_problem(net, made, tmp_path, form):
    kernels, least = KERNELS[form]
    report = validate(made / form, net, out=tmp_path)
    assert report.problems == ()
    assert report.foreign.matched == {"values": 6, "names": 0, "order": 0} and report.foreign.missing == ()
    assert [row.name for row in report.layers.linears] == LINEARS
    assert min(row.own_sqnr_db or np.inf for row in report.layers.linears) > least, "None: bit for bit"
    assert not kernels or {row.kernel for row in report.layers.linears} == kernels
    (output,) = report.outputs
    assert output.sqnr_db > least and "head.2" in (tmp_path / "report.html").read_text()


def scaled(name):
    """The scales of a weight times 1.5, whichever operators read them."""

    def change(model):
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        known = next(found for found in tensors if found.startswith(name) and found.endswith("_scale"))
        files.edit(model, known, lambda scales: (scales * 1.5).astype(np.float32))

    return change


def garbage(model):
    """The codes of a convolution shuffled."""
    (name,) = (t.name for t in model.graph.initializer if list(t.dims) == [24, 16, 1, 1])
    shuffled = np.random.default_rng(0).permutation
    files.edit(model, name, lambda codes: shuffled(codes.ravel()).reshape(codes.shape))


def range_of_an_input(model):
    """The static scale of what the depthwise convolution reads, a tenth, and its bias's with it."""
    product = next(node for node in model.graph.node if node.op_type == "Conv" and "features.6" in node.name)
    for name in (product.input[0], product.input[2]):
        made = next(node for node in model.graph.node if node.output[0] == name)
        files.edit(model, made.input[1], lambda scale: (scale / 10).astype(np.float32))


FAULTS = {
    "qdq": (scaled("head.0.weight"), "head.0: its weight is 1.5 times the float one"),
    "operators": (scaled("head.2.weight"), "head.2: its weight is 1.5 times the float one"),
    "dynamic": (garbage, "features.8: its weight is not the float one"),
    "range": (range_of_an_input, "of its input is beyond its static scale"),
}


@pytest.mark.by_default("qdq", "operators")
@pytest.mark.parametrize("form", FAULTS)
def test_planted_fault_is_named_first(net, made, tmp_path, form):
    plant, said = FAULTS[form]
    source = made / ("qdq" if form == "range" else form)
    report = validate(files.changed(source, tmp_path / "planted", plant), net)
    assert said in report.problems[0], report.problems


def test_ports_by_place(net, made, tmp_path):
    def renamed(model):
        for values in (model.graph.input, model.graph.output):
            values[0].name = f"x_{values[0].name}"
        for node in model.graph.node:
            node.input[:] = [f"x_{name}" if name == "image" else name for name in node.input]
            node.output[:] = [f"x_{name}" if name == "scores" else name for name in node.output]

    report = validate(files.changed(made / "float", tmp_path / "renamed", renamed), net)
    assert report.problems == () and report.outputs[0].sqnr_db > 120


def test_bad_input_is_one_sentence(net, made, tmp_path):
    class Other(Net):
        def forward(self, picture, more):
            return super().forward(picture) + more.mean()

    with pytest.raises(InputError, match="has 1 inputs, image, and the module 2: picture, more"):
        qexport.validate(made / "float", Other().eval(), inputs=[(images(), images())], out=tmp_path)
    torch.manual_seed(5)
    with pytest.raises(InputError, match="0 of its 6 linears and convolutions have weights like those here"):
        validate(made / "float", Net().eval(), out=tmp_path)
    with pytest.raises(InputError, match="limits are for language models"):
        validate(made / "float", net, out=tmp_path, max_kl=0.1)
    with pytest.raises(InputError, match="is compared on tensors"):
        qexport.validate(made / "float", net, out=tmp_path)


def test_convolutions_that_do_not_fuse_say_why(net, made, tmp_path):
    """Without the rounding behind it ONNX Runtime leaves a convolution float, codes or not."""

    def change(model):
        graph, name = model.graph, next(n.output[0] for n in model.graph.node if "features.8/Conv" in n.name)
        rounded = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == name)
        back = next(node for node in graph.node if rounded.output[0] in node.input)
        for node in graph.node:
            node.input[:] = [name if value == back.output[0] else value for value in node.input]
        for node in (rounded, back):
            graph.node.remove(node)

    report = validate(files.changed(made / "qdq", tmp_path / "unfused", change), net)
    assert report.problems == (
        "features.8 not fused, so that its codes become float again at every run: nothing rounds its result",
    )
