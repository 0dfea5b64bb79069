"""Arrays on their way into ONNX Runtime and back."""

import numpy as np
import pytest
import torch

from qexport.runtime.values import array_of, value_of


@pytest.mark.parametrize("kind, dtype", [
    ("tensor(float)", torch.float32), ("tensor(float16)", torch.float16), ("tensor(bfloat16)", torch.bfloat16)
])  # fmt: skip
def test_numbers_are_rounded_as_pytorch_rounds_them(kind, dtype):
    numbers = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    numbers = torch.cat([numbers, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -0.0, 3e-30])])  # ties, and what is small
    value = value_of(numbers.numpy(), kind)
    assert value.data_type() == kind
    assert torch.equal(torch.from_numpy(array_of(value).astype(np.float32)), numbers.float().to(dtype).float())


def test_ids_are_long():
    value = value_of(np.array([[1, 2]], np.int32)[:, ::-1], "tensor(int64)")
    assert value.data_type() == "tensor(int64)" and array_of(value).tolist() == [[2, 1]]
