import numpy as np
import onnx
import onnxruntime as ort
import pytest

from helpers.onnx_decoder import ACCURACY, write_tiny_decoder
from qexport.artifact.manifest import CPU, CUDA, save
from qexport.errors import InputError, RuntimeProblem
from qexport.runtime.decoder import Decoder
from qexport.runtime.doctor import check_provider
from qexport.runtime.session import OptimizedNode, kernel_of, open_session, optimized_graph, unfused

IDS = np.array([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    # Float everywhere but in the int4 linears: a rounding of 1e-7 would move an 8-bit code of an activation.
    return folder, write_tiny_decoder(folder, up_scheme="float")


def unoptimized_logits(folder):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(folder / "model.onnx", options, providers=[CPU])
    return Decoder(session).run(IDS)


def test_session_computes_with_the_entries_of_the_manifest(export):
    folder, manifest = export
    exact = unoptimized_logits(folder)
    level_0 = Decoder(open_session(folder)).run(IDS)
    level_4 = Decoder(open_session(folder, manifest.model_copy(update={"session": {ACCURACY: "4"}}))).run(IDS)
    # Sums in another order, over at most 128 float32 products.
    np.testing.assert_allclose(level_0, exact, rtol=0, atol=1e-4)
    assert np.abs(level_4 - exact).max() > 1e-3  # int8 activations inside the kernel


def test_threads_are_set(export):
    assert open_session(export[0], threads=1).get_session_options().intra_op_num_threads == 1


def test_missing_provider_is_an_error_with_a_remedy_and_no_fallback(export):
    folder, manifest = export
    if check_provider(CUDA).ok:
        pytest.skip("CUDA loads here")
    built = CUDA in ort.get_available_providers()
    why = r"CUDAExecutionProvider is not available: the library lib\S+ is not found" if built else "built without it"
    with pytest.raises(RuntimeProblem, match=why):
        open_session(folder, provider="cuda")
    with pytest.raises(RuntimeProblem, match="See `qexport doctor`, or run the file on the CPU with provider cpu"):
        open_session(folder, manifest.model_copy(update={"provider": CUDA, "target": "cuda"}))


def test_file_made_for_cuda_runs_on_the_cpu_when_asked_to(export):
    folder, manifest = export
    made_for_cuda = manifest.model_copy(update={"provider": CUDA, "target": "cuda"})
    for name in (CPU, "cpu", "CPU"):
        assert open_session(folder, made_for_cuda, provider=name).get_providers() == [CPU]


def test_unknown_provider_is_an_error(export):
    with pytest.raises(InputError, match="there is no execution provider called 'abacus'. Available: .*cpu"):
        open_session(export[0], provider="abacus")


def test_a_provider_that_another_package_has_was_not_built_in(export):
    with pytest.raises(RuntimeProblem, match="MIGraphXExecutionProvider is not available: .* built without it"):
        open_session(export[0], provider="migraphx")


def test_unreadable_model_is_a_runtime_problem(tmp_path):
    write_tiny_decoder(tmp_path, layers=1)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeProblem, match="refuses the model"):
        open_session(tmp_path)


def test_folder_that_is_no_export_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="not an export"):
        open_session(tmp_path)


def test_optimized_graph_shows_the_kernel_of_every_planned_linear(tmp_path):
    manifest = write_tiny_decoder(tmp_path)
    graph = optimized_graph(tmp_path)
    assert unfused(graph, manifest.linears) == []
    counts = graph.op_counts()
    assert (counts["MatMulNBits"], counts["MatMulIntegerToFloat"], counts["MatMul"]) == (8, 2, 3)
    assert set(graph.nodes_per_provider()) == {CPU}
    fused = next(node for node in graph.nodes if node.op_type == "MatMulNBits")
    assert (fused.domain, fused.provider) == ("com.microsoft", CPU)


def test_linear_that_does_not_fuse_is_named_with_what_it_became(tmp_path):
    manifest = write_tiny_decoder(tmp_path)
    off = manifest.model_copy(update={"session": {"session.disable_quant_qdq": "1"}})
    found = unfused(optimized_graph(tmp_path, off), manifest.linears)
    assert {linear.name for linear, _ in found} == {n.name for n in manifest.linears if n.scheme != "float"}
    assert {kernel for _, kernel in found} == {"MatMul"}


def test_linear_is_found_by_its_node_when_its_value_is_gone_and_by_its_value_when_its_node_is():
    fused = OptimizedNode("mm", "MatMulNBits", "com.microsoft", ("x",), ("with_bias",), CPU)
    other = OptimizedNode("add", "Add", "", ("with_bias",), ("y",), CPU)
    assert kernel_of([fused, other], "gone", "mm") == "MatMulNBits"
    assert kernel_of([fused, other], "with_bias", "gone") == "MatMulNBits"
    assert kernel_of([fused, other], "y", "mm") == "MatMulNBits"
    assert kernel_of([fused, other], "gone", "gone") is None
    assert kernel_of([OptimizedNode("", "Mul", "", (), ("z",), None)], "gone") is None


def test_optimized_model_is_written_with_its_weights_beside_it_and_computes_the_same(export, tmp_path):
    folder, manifest = export
    target = tmp_path / "optimized.onnx"
    logits = Decoder(open_session(folder, outputs_path=target)).run(IDS)
    assert (tmp_path / "optimized.data").stat().st_size > 0
    assert any(node.op_type == "MatMulNBits" for node in onnx.load(target, load_external_data=False).graph.node)
    again = Decoder(open_session(target, manifest)).run(IDS)
    np.testing.assert_array_equal(again, logits)


def test_manifest_of_the_files_own_folder_is_used_for_a_path(export):
    folder, _ = export
    session = open_session(folder / "model.onnx")
    assert session.get_session_options().get_session_config_entry(ACCURACY) == "0"


def test_bad_session_entry_is_a_runtime_problem(tmp_path):
    manifest = write_tiny_decoder(tmp_path, layers=1)
    save(manifest.model_copy(update={"session": {ACCURACY: "99"}}), tmp_path)
    with pytest.raises(RuntimeProblem, match="accuracy level must be"):
        open_session(tmp_path)
