"""Several processes make one export: what they know together, what they write, and what becomes of it if one dies."""

import json
import signal
import subprocess
import sys

import onnx
import pytest
import torch
import yaml

from helpers.commands import Command
from helpers.random_modules import save_encoder
from helpers.rank_runs import ROWS, gather_statistics, started, statistics, stream, told
from qexport import ranks
from qexport.artifact.manifest import MODEL_FILE
from qexport.runtime.tensors import tensor_of

INTEGERS = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
CALIBRATION = {"source": "random", "samples": 8, "sequence_length": 16, "batch_size": 2}
STATIC = {
    "scheme": "w8a8_static", "lm_head": "w4a16_g32", "weights": {"method": "gptq"}, "smooth": {"method": "smoothquant"},
    "calibration": CALIBRATION,
}  # fmt: skip


def recipe(place, **keys) -> str:
    place.write_text(yaml.safe_dump({"name": "shared", **keys}))
    return str(place)


def codes(folder) -> dict:
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    return {t.name: tensor_of(t, folder) for t in graph.initializer if t.data_type in INTEGERS}


def assert_alike(found, wanted) -> None:
    """Codes are equal to 99.9 %: sums in another order turn one now and then."""
    found, wanted = codes(found), codes(wanted)
    assert found.keys() == wanted.keys()
    equal, count = (sum(f(name) for name in wanted) for f in (
        lambda name: int((found[name] == wanted[name]).sum()), lambda name: wanted[name].size,
    ))  # fmt: skip
    assert count and equal >= 0.999 * count


def test_statistics_of_all_ranks_are_those_of_one(tmp_path):
    for process in started(tmp_path / "notes", 2, tmp_path, work=gather_statistics):
        assert process.wait() == 0, process.stderr
    alone = statistics()
    for statistic in alone.values():
        statistic.update(stream())
    wanted, (first, second) = told(alone), (torch.load(tmp_path / f"{rank}.pt") for rank in "01")
    for name, value in wanted.items():
        for found in (first[name], second[name]):
            if name == "rows":  # another sample, as large
                assert found.shape == value.shape and torch.isin(found[:, 0], stream()[:, 0]).all()
                assert torch.isin(found[:, 0], stream()[ROWS // 2 :, 0]).any()
            else:
                torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    assert [torch.load(tmp_path / f"{rank}.first") for rank in "01"] == ["made by 0", "made by 0"]


def test_two_ranks_make_the_export_of_one(tmp_path, run):
    model = save_encoder("bert", tmp_path / "bert")
    given = ["export", model, "-r", recipe(tmp_path / "r.yaml", **STATIC)]
    both = started(tmp_path / "notes", 2, *given, "-o", tmp_path / "two")
    assert run(*given, "-o", tmp_path / "one")[0] == 0
    for process in both:
        assert process.wait() == 0, process.stderr
    assert both[0].stdout and not both[1].stdout and "quantize" not in both[1].stderr
    assert_alike(tmp_path / "two", tmp_path / "one")
    blocks = [json.loads((tmp_path / n / "report.json").read_text())["export"]["blocks"] for n in ("one", "two")]
    for alone, shared in zip(*blocks, strict=True):
        assert shared["sqnr_db"] == pytest.approx(alone["sqnr_db"], abs=0.05)
        assert shared["changed"].keys() == alone["changed"].keys() and shared["skipped"] == alone["skipped"]
    assert not list(tmp_path.glob(".*.work"))


def test_work_is_shared_out_evenly(monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 3)
    assert ranks.owners([9.0, 1.0, 5.0, 4.0, 8.0]) == [0, 1, 2, 2, 1]
    assert [ranks.share(8) for _ in range(1)] == [slice(0, 2)]
    monkeypatch.setattr(ranks, "rank", lambda: 2)
    assert ranks.share(8) == slice(5, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"calibration": CALIBRATION | {"batch_size": 8}, "weights": {"method": "gptq"}}, "1 batches are too few for"),
        ({"weights": {"method": "autoround"}}, "shared trains on all samples by one process only"),
    ],
)
def test_what_ranks_cannot_do_is_said_by_one_message_each(keys, message, tmp_path, model_folder):
    path = recipe(tmp_path / "r.yaml", scheme="w4a16_g32", **{"calibration": CALIBRATION, **keys})
    both = started(tmp_path / "notes", 2, "export", model_folder("llama"), "-r", path, "-o", tmp_path / "out")
    for process in both:
        assert process.wait() == 2
        assert message in process.stderr or "another rank has ended" in process.stderr
        assert "Traceback" not in process.stderr
    assert any(message in process.stderr for process in both)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_that_dies_ends_the_run_and_any_number_of_ranks_goes_on(number, tmp_path, model_folder):
    """The second rank stands still while a layer is quantized, and is killed there."""
    given = ["export", model_folder("llama"), "-r", recipe(tmp_path / "r.yaml", **STATIC)]
    both = started(tmp_path / "notes", 2, *given, "-o", tmp_path / "out")
    assert both[0].writes("quantize 2/4")
    both[1].send(signal.SIGSTOP)
    both[1].send(number)
    both[1].send(signal.SIGCONT)
    assert both[0].wait() == 2 and both[1].wait() != 0
    assert both[0].stderr.count("another rank has ended") == 1 and "Traceback" not in both[0].stderr
    assert "--resume" in both[0].stderr and not (tmp_path / "out").exists()
    on = Command(tmp_path / "on", *given, "-o", tmp_path / "out", "--resume")
    whole = Command(tmp_path / "whole_notes", *given, "-o", tmp_path / "whole")
    assert on.wait() == 0, on.stderr
    assert whole.wait() == 0
    assert_alike(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w4a16_g32", "w8a8_dyn", "w4a16_g64_awq", "w4a16_g64_lorc", "fptq"])
def test_recipes_in_one_two_and_three_ranks(name, tmp_path, model_folder, run):
    import qexport

    found = qexport.Recipe.load(name).with_calibration(**CALIBRATION)
    (tmp_path / "r.yaml").write_text(found.to_yaml())
    given = ["export", model_folder("llama"), "-r", tmp_path / "r.yaml"]
    assert run(*given, "-o", tmp_path / "1")[0] == 0
    for count in (2, 3):
        for process in started(tmp_path / f"notes{count}", count, *given, "-o", tmp_path / str(count)):
            assert process.wait() == 0, process.stderr
        assert_alike(tmp_path / str(count), tmp_path / "1")


@pytest.mark.slow
def test_torchrun_as_typed_twice_the_same_bytes(tmp_path, model_folder):
    path = recipe(tmp_path / "r.yaml", **STATIC)
    for out in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qexport", "export",
             model_folder("llama"), "-r", path, "-o", tmp_path / out], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    for name in (MODEL_FILE, "model.onnx.data"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_alone_nothing_is_exchanged():
    assert ranks.size() == 1 and ranks.gather(3) == [3] and ranks.first(lambda: 4) == 4
    ranks.combine([object()])
    with ranks.joined():
        assert ranks.rank() == 0 and ranks.share(5) == slice(0, 5)
