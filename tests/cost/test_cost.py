"""What an export takes, from shapes and speeds."""

import pytest
import torch

from qexport.cost.estimate import both, estimated
from qexport.cost.machine import Machine, measured, seconds, share_reached
from qexport.cost.work import Data, Effort, Reading, Work, block_memory, block_work
from qexport.formatting import duration

READS = (Reading(8, (4, 2)), Reading(16, (8,), quantized=False))
DATA, NONE = Data(samples=10, length=3, batch=4, hidden=5), Data(0, 3, 4, 5)


def test_work_of_a_block():
    found = block_work(READS, DATA, Effort(passes=2, hessians=True))
    assert found.forward == 2 * 30 * (2 * (8 * 6 + 16 * 8) + 4 * 3 * 5)
    assert found.sums == 30 * 8**2 and found.factors == pytest.approx(2 / 3 * 8**3) and found.rounding == 8 * 8 * 6
    assert found.largest == found.factors + found.rounding
    assert found.flops == found.forward + found.sums + found.factors + found.rounding
    weights, values = 8 * 6 + 16 * 8, 8 + 6 + 16 + 8
    assert found.moved == 4 * 2 * (3 * weights + 2 * 30 * values) + (8 + 40) * 4 * 8 * 6


def test_without_data_a_weight_is_rounded_and_nothing_runs():
    found = block_work(READS, NONE, Effort(passes=0))
    assert found.flops == 0 and found.moved == 8 * 4 * 8 * 6


def test_memory_holds_weights_activations_and_two_hessians():
    weights, between = 8 * 6 + 16 * 8, 2 * 30 * 5
    batch, rounding = 12 * (16 + 2 * 8), 2 * 8**2 + 2 * 4 * 8
    assert block_memory(READS, DATA, Effort(2, hessians=True)) == 4 * (weights + between + max(batch, rounding))


def test_devices_share_all_but_the_largest_value():
    work = Work(forward=60.0, sums=20.0, factors=30.0, rounding=10.0, largest=25.0, moved=8.0, weights=6)
    assert seconds(work, Machine(10, 4, reached=0.5, host=0.5)) == pytest.approx(120 / 5 + 2 + 3)
    streamed = seconds(work, Machine(10, 4, reached=0.5, host=0, streamed=40))
    assert streamed == pytest.approx((80 / 40 + 40 / 10) / 0.5 + 2)
    many = seconds(work, Machine(10, 4, devices=4, link=2, reached=0.5, host=0), READS, DATA)
    exchanged = (2 * 4 * 8**2 + 8 * 6) * 3 / 4 / 2
    assert many == pytest.approx((80 / 4 + 25) / 5 + 8 / 4 / 4 + exchanged)


def test_an_estimate_adds_blocks_and_takes_the_largest_memory():
    blocks = {"a": READS, "b": READS[:1]}
    found = estimated(blocks, DATA, Effort(2, True), Machine(1e3, 1e3), file=100)
    parts = [block_work(reads, DATA, Effort(2, True)) for reads in blocks.values()]
    assert found.work.flops == sum(part.flops for part in parts)
    assert found.seconds == pytest.approx(sum(seconds(part, Machine(1e3, 1e3)) for part in parts))
    assert found.memory == block_memory(READS, DATA, Effort(2, True)) and found.disk == 100 + 2 * 8 * 6
    assert estimated(blocks, DATA, Effort(2, True), None, 100).sentence().startswith("a few seconds, for 0.00 TFLOP")
    assert both([found, found]).seconds == 2 * found.seconds and both([found, found]).memory == found.memory


def test_a_machine_is_measured_once():
    found = measured(torch.device("cpu"))
    assert found.flops > 1e8 and found.bandwidth > 1e7 and measured(torch.device("cpu")) is found
    assert found.streamed == found.flops and found.reached == share_reached(torch.get_num_threads())
    assert measured(torch.device("cpu"), products="bfloat16").streamed > 1e8
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("given", "said"), [(0.2, "a second"), (80, "80 seconds"), (600, "10 minutes"), (9000, "2.5 hours")]
)
def test_durations(given, said):
    assert duration(given) == said
