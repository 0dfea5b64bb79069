"""Dynamic dimensions as qexport writes them and as torch.export does, and modules that are their own only layer."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import qexport
from qexport.capture.dynamic import dynamic_axes
from qexport.capture.module import capture_module
from qexport.errors import InputError

GIVEN = {"x": torch.ones(2, 3, 8), "y": torch.ones(5, 8)}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, {"x": {0: "batch"}, "y": {0: "y.batch"}}),
        ({"x": {1: "length"}}, {"x": {1: "length"}, "y": {}}),
        ({"x": {0: Dim("b", min=2, max=9), 1: None}, "y": None}, {"x": {0: "b"}, "y": {}}),
        (({0: Dim("b")}, None), {"x": {0: "b"}, "y": {}}),
        ([(Dim.AUTO, Dim.DYNAMIC, Dim.STATIC), {0: Dim.AUTO}], {"x": {0: "batch", 1: "x_1"}, "y": {0: "y_0"}}),
        (((None, "length", 8), (Dim("n"), None)), {"x": {1: "length"}, "y": {0: "n"}}),
    ],
)
def test_every_way_to_write_dimensions(wanted, found):
    assert dynamic_axes(GIVEN, wanted) == found


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"z": {0: "b"}}, "no input is called z"),
        (({0: "b"},), "1 entries for 2 inputs"),
        (({3: "b"}, None), "x has no dimension 3"),
        (((Dim("b"),), None), "1 dimensions of x, which has 3"),
        (({0: 2 * Dim("b")}, None), r"'2\*b' is no name"),
        (({0: 7}, None), "'7' is no name"),
        (("batch", None), "'batch' are no dimensions of x"),
        (object(), "an? object says nothing"),
    ],
)
def test_anything_else_is_one_sentence(wanted, why):
    with pytest.raises(InputError, match=f"dynamic_shapes: {why}"):
        dynamic_axes(GIVEN, wanted)


def test_a_hint_may_turn_out_fixed_and_a_name_may_not():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, 12) @ torch.ones(12, 2)

    example = (torch.ones(2, 3, 4),)
    assert capture_module(Fixed(), example, ((Dim.AUTO, None, None),)).inputs[0].dims == (2, 3, 4)
    with pytest.raises(qexport.QExportError, match="dimension 0 .b. of x is always 2"):
        capture_module(Fixed(), example, {"x": {0: "b"}})


@pytest.mark.parametrize(
    ("module", "example"),
    [(nn.Linear(32, 16), torch.randn(2, 32)), (nn.Conv1d(4, 8, 3), torch.randn(2, 4, 16))],
    ids=["linear", "convolution"],
)
def test_the_module_itself_may_be_the_layer(all_convolutions, module, example, tmp_path):
    inputs = [(example,)]
    made = qexport.export(
        module, "w8a8_static", out_dir=tmp_path / "out", example_inputs=(example,), calibration=inputs
    )
    assert [p.name for p in (*made.plan, *made.convolutions) if p.scheme is not None] == ["root"]
    report = qexport.validate(made.folder, module, inputs=inputs, threads=1)
    assert report.outputs[0].sqnr_db > 20 and not report.problems


def test_torchscript_is_refused_in_one_sentence(tmp_path):
    scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(InputError, match="is a TorchScript module"):
        qexport.export(scripted, out_dir=tmp_path / "out", example_inputs=(torch.ones(1, 4),))
    with pytest.raises(InputError, match="a ScriptFunction is not a model"):
        traced = torch.jit.trace(lambda x: x + 1, torch.ones(1, 4))
        qexport.export(traced, out_dir=tmp_path / "out", example_inputs=(torch.ones(1, 4),))


def test_pictures_of_several_sizes_are_compared(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.PReLU()).eval()
    first, others = (torch.randn(1, 3, 16, 20),), [(torch.randn(1, 3, 24, 18),), (torch.randn(2, 3, 16, 31),)]
    made = qexport.export(
        net, "w8a8_static", out_dir=tmp_path / "out", example_inputs=first, calibration=[first, *others],
        dynamic_shapes={"input": {0: "batch", 2: "height", 3: "width"}},
    )  # fmt: skip
    report = qexport.validate(made.folder, net, inputs=[first, *others], threads=1)
    assert len(made.convolutions) == 2 and not report.problems
    assert report.outputs[0].sqnr_db > 25 and all(row.sqnr_db > 25 for row in report.layers.blocks)
