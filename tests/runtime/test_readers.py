"""Tables of the operators of other runtimes, and what they say of a file."""

import json

import onnx
import pytest
from onnx import TensorProto, helper

from helpers.onnx_decoder import write_tiny_decoder
from qexport.errors import InputError
from qexport.runtime import readers


def write(path, nodes, opset=21, kind=TensorProto.FLOAT):
    values = [helper.make_tensor_value_info(name, kind, [2, 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return path


def test_tables_know_operators_that_there_are():
    history: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        history.setdefault(schema.name, set()).add(schema.since_version)
    tables = [readers.table_of(name) for name in readers.names()]
    assert all(table.version and table.source and table.otherwise and table.take for table in tables)
    assert all({*table.conditions, *table.notes} <= {*table.operators, *table.contrib} for table in tables)
    for operator, versions in (entry for table in tables for entry in table.operators.items()):
        known = history.get(operator, set())
        if versions == "any":  # Inverse is a contrib operator that the source of the table does not tell apart
            assert known or operator == "Inverse"
        else:
            assert versions.keys() <= known
            assert all(TensorProto.DataType.Value(kind) for kinds in versions.values() for kind in kinds)


@pytest.mark.parametrize(
    ("reader", "node", "inputs", "attributes", "why"),
    [
        ("directml", "MatMulNBits", "x w s", {"bits": 4}, ""),
        ("directml", "MatMulNBits", "x w s", {"bits": 2}, "not with bits 2"),
        ("directml", "MatMulNBits", ["x", "w", "s", "", "", "b"], {"bits": 4}, "not with its input 5"),
        ("directml", "GroupQueryAttention", ["x", "", "", "p", "q"], {}, "not without its input 1"),
        ("directml", "GroupQueryAttention", "x k v p q", {"do_rotary": 1}, "not with do_rotary 1"),
        ("openvino", "GroupQueryAttention", "x k v p q", {"kv_cache_bit_width": 8}, "not with kv_cache_bit_width 8"),
        ("coreml", "Gemm", "x w", {}, ""),
        ("coreml", "Gemm", "x v", {}, "its input 1 is not constant"),
    ],
)
def test_a_node_is_missing_by_attributes_or_inputs(tmp_path, reader, node, inputs, attributes, why):
    domain = "" if node == "Gemm" else "com.microsoft"
    given = inputs.split() if isinstance(inputs, str) else inputs
    path = write(tmp_path / "m.onnx", [helper.make_node(node, given, ["y"], domain=domain, **attributes)])
    model = onnx.load(path)
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0]))
    onnx.save(model, path)
    assert [m.why for m in readers.runs_on(path, reader).missing] == ([why] if why else [])


def test_what_no_table_can_check_is_said_of_operators_that_there_are(tmp_path):
    made = helper.make_node("Gather", ["x", "x"], ["y"])
    found = readers.runs_on(write(tmp_path / "m.onnx", [made]), "qnn")
    assert found.notes == {"Gather": "of indices that are not negative"} and not found.varying


@pytest.mark.parametrize(
    ("node", "opset", "kind", "why"),
    [
        (("Sin",), 21, TensorProto.FLOAT, ""),
        (("Sin",), 23, TensorProto.FLOAT, "its version 22 is not among 7"),
        (("CumSum",), 21, TensorProto.FLOAT, "no such operator"),
        (("Neg",), 21, TensorProto.INT64, "not of int64"),
        (("Neg",), 21, TensorProto.FLOAT16, ""),
        (("QuickGelu", "com.microsoft"), 21, TensorProto.FLOAT, ""),
        (("MatMulBnb4", "com.microsoft"), 21, TensorProto.FLOAT, "no such operator"),
        (("SimplifiedLayerNormalization",), 21, TensorProto.FLOAT, ""),
        (("QuickGelu", "of.mine"), 21, TensorProto.FLOAT, "no such operator"),
    ],
)
def test_a_node_is_missing_by_name_version_or_type(tmp_path, node, opset, kind, why):
    made = helper.make_node(node[0], ["x"], ["y"], name="it", domain=node[1] if len(node) > 1 else "")
    found = readers.runs_on(write(tmp_path / "m.onnx", [made], opset, kind), "webgpu")
    assert found.nodes == 1
    assert [(m.why, m.count, m.example) for m in found.missing] == ([(why, 1, "it")] if why else [])


def test_nodes_within_nodes_count_and_constants_do_not(tmp_path):
    inner = helper.make_graph(
        [helper.make_node("CumSum", ["x", "axis"], ["i"])], "inner", [],
        [helper.make_tensor_value_info("i", TensorProto.FLOAT, [2, 4])],
    )  # fmt: skip
    axis = helper.make_node("Constant", [], ["axis"], value_int=0)
    yes = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    both = helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner)
    found = readers.runs_on(write(tmp_path / "m.onnx", [axis, yes, both]), "webgpu")
    assert found.nodes == 3 and [(m.operator, m.count) for m in found.missing] == [("CumSum", 2)]


def test_the_command_line_says_it(run, tmp_path):
    write_tiny_decoder(tmp_path)
    code, out, _ = run("inspect", tmp_path, "--runs-on", "webgpu")
    assert code == 0 and "Attention" in out and "QuantizeLinear" in out and "1.27.0" in out
    code, out, _ = run("inspect", tmp_path, "--runs-on", "qnn", "--json")
    found = json.loads(out)
    assert code == 0 and found["nodes"] > 20 and {m["operator"] for m in found["missing"]} >= {"Attention"}
    assert found["varying"][:1] == ["input_ids"] and "fixed" in found["take"]
    names = "coreml or directml or openvino or qnn or webgpu"
    for folder, reader, words in ((tmp_path, "abacus", names), (tmp_path / "x", "qnn", "no model")):
        code, _, err = run("inspect", folder, "--runs-on", reader)
        assert code == 2 and words in err


def test_no_file_is_an_input_error(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match="cannot be read as ONNX"):
        readers.runs_on(tmp_path, "qnn")
