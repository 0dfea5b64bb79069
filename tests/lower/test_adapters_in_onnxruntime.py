"""What ONNX Runtime does with adapters that a run makes active, on which docs/adapters.md and the decoder rely."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from qexport.artifact.adapter_files import write_adapter

ONES = np.ones((1, 2), np.float32)


@pytest.fixture(scope="module")
def session():
    """y = x A, with A [2, r] an input that is empty by default."""
    ports = [("x", [1, 2]), ("A", [2, "r"]), ("y", [1, "r"])]
    x, a, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in ports)
    empty = helper.make_tensor("A", TensorProto.FLOAT, [2, 0], [])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "A"], ["y"])], "graph", [x, a], [y], [empty])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture
def active(tmp_path):
    """active(1.0, 2.0): the options of a run with two adapters, whose A is all 1 and all 2."""
    kept = []

    def make(*values):
        options = ort.RunOptions()
        for value in values:
            file = tmp_path / f"{value}.onnx_adapter"
            write_adapter(file, {"A": np.full((2, 1), value, np.float32)})
            kept.append(ort.LoraAdapter())
            kept[-1].Load(str(file))
            options.add_active_adapter(kept[-1])
        return options

    return make


def test_an_active_one_is_taken_instead_of_the_default(session, active):
    assert session.run(None, {"x": ONES})[0].shape == (1, 0)
    assert session.run(None, {"x": ONES}, active(1.0))[0] == 2


def test_it_overrides_what_is_fed_and_of_two_the_first_counts(session, active):
    fed = {"x": ONES, "A": np.full((2, 1), 5.0, np.float32)}
    assert session.run(None, fed)[0] == 10 and session.run(None, fed, active(1.0))[0] == 2
    assert session.run(None, {"x": ONES}, active(1.0, 2.0))[0] == 2
    assert session.run(None, {"x": ONES}, active(2.0, 1.0))[0] == 4


def test_a_run_through_a_binding_ignores_it(session, active):
    binding = session.io_binding()
    binding.bind_cpu_input("x", ONES)
    binding.bind_output("y")
    session.run_with_iobinding(binding, active(1.0))
    assert binding.copy_outputs_to_cpu()[0].shape == (1, 0)
    binding.bind_ortvalue_input("A", ort.OrtValue.ortvalue_from_numpy(np.full((2, 1), 1.0, np.float32)))
    binding.clear_binding_outputs()
    binding.bind_output("y")
    session.run_with_iobinding(binding, ort.RunOptions())
    assert binding.copy_outputs_to_cpu()[0] == 2
