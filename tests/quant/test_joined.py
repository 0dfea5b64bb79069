import pytest
import torch

from qexport.quant.concat_tensor import ConcatTensor

TENSORS = {
    "codes": torch.arange(6, dtype=torch.int8).view(2, 3), "more": torch.ones(2, 1, dtype=torch.int8),
    "bias": torch.tensor([1.0, 2.0], dtype=torch.float16),
}  # fmt: skip


def test_parts_follow_each_other_along_the_last_axis():
    made = ConcatTensor(("more", "codes")).make(TENSORS.get)
    assert made.dtype == torch.int8 and made.tolist() == [[1, 0, 1, 2], [1, 3, 4, 5]]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_numbers_are_zeros_of_the_same_type(device):
    made = ConcatTensor((3, "bias", 1)).make(lambda name: TENSORS[name].to(device))
    assert made.dtype == torch.float16 and made.shape == (6,) and made.device.type == device
    if device == "cpu":
        assert made.tolist() == [0, 0, 0, 1, 2, 0]
