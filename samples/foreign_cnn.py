"""A CNN of torchvision in files of other tools, each compared with the module, good and with a fault in it.

    python samples/foreign_cnn.py [--model mobilenet_v3_small] [--size 96]

torch.onnx writes it, ONNX Runtime's quantizers make the other forms. Weights are random, of one seed, and the batch
norms have the statistics of random images. The fault: the scales of the middle convolution's weight times 1.5. It needs
torchvision.
"""

import argparse
import logging
import math
import statistics
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

import qexport
from qexport.validation.report import Report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v3_small")
    parser.add_argument("--size", type=int, default=96, help="of images")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    model = made(given.model, given.size)
    inputs = [(images(given.size, seed),) for seed in (50, 51)]
    print("| file | found | kernels | SQNR of the output | lowest layer | with a fault, first problem |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory(prefix="qexport-") as place:
        for name, file in files(model, given.size, Path(place)):
            report = qexport.validate(file, model, inputs=inputs)
            other = file.with_name("fault.onnx")
            damage(file, other)
            fault = qexport.validate(other, model, inputs=inputs)
            print("| " + " | ".join([name, *row(report), *fault.problems[:1]]) + " |", flush=True)


def made(name: str, size: int) -> nn.Module:
    """The module, its batch norms with statistics of images."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    with torch.no_grad():
        for seed in range(10):
            model.train()(images(size, seed))
    return model.eval()


def images(size: int, seed: int, count: int = 4) -> torch.Tensor:
    """Noise with some of it shared by neighbours, as pictures have."""
    random = torch.Generator().manual_seed(seed)
    fine, coarse = (torch.randn(count, 3, size // by, size // by, generator=random) for by in (1, 8))
    return fine / 2 + nn.functional.interpolate(coarse, (size, size))


def files(model: nn.Module, size: int, folder: Path):
    """(what it is, the file) of every form."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self._left = iter([{"image": images(size, seed).numpy()} for seed in range(4)])

        def get_next(self):
            return next(self._left, None)

    def at(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name / "model.onnx"

    source = at("float")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (images(size, 0),), str(source), input_names=["image"], output_names=["scores"], dynamo=False,
            dynamic_axes={"image": {0: "n"}, "scores": {0: "n"}},
        )  # fmt: skip
    yield "torch.onnx", source
    prepared = at("prepared")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    qdq, operators, dynamic = at("qdq"), at("operators"), at("dynamic")
    quantize_static(prepared, qdq, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    yield "quantize_static, QDQ, per channel", qdq
    quantize_static(prepared, operators, Reader(), quant_format=QuantFormat.QOperator)
    yield "quantize_static, operators", operators
    quantize_dynamic(prepared, dynamic)
    yield "quantize_dynamic", dynamic


def row(report: Report) -> list[str]:
    linears = report.layers.linears
    kernels = Counter(found.kernel or "inside of others" for found in linears)
    own = {found.name: math.inf if found.own_sqnr_db is None else found.own_sqnr_db for found in linears}
    worst, middle = min(own, key=lambda name: own[name]), statistics.median(own.values())
    return [
        f"{sum(report.foreign.matched.values())} of {len(linears) + len(report.foreign.missing)}",
        ", ".join(f"{n} {kernel}" for kernel, n in kernels.most_common()), f"{report.outputs[0].sqnr_db:.1f} dB",
        f"{worst}, {own[worst]:.1f} dB (median {middle:.1f})" + "".join(f"; {p}" for p in report.problems),
    ]  # fmt: skip


def damage(source: Path, target: Path) -> None:
    """The scales of a weight times 1.5; of a file of floats the weight."""
    model = onnx.load(source)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type in ("Conv", "QLinearConv", "ConvInteger")]
    product = products[len(products) // 2]
    weight = product.input[3] if product.op_type == "QLinearConv" else product.input[1]
    made = next((node for node in model.graph.node if weight in node.output), None)
    weight = weight if made is None else made.input[0]
    known = weight if weight.removesuffix("_quantized") == weight else weight.removesuffix("_quantized") + "_scale"
    tensor = tensors[known]
    tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * 1.5).astype(np.float32), known))
    onnx.save(model, target)


if __name__ == "__main__":
    main()
