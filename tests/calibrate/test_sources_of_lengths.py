"""Sound of different lengths: each source is read without padding."""

import pytest
import torch
from safetensors.torch import save_file

from qexport.calibrate.features import sources_of_lengths
from qexport.capture.graph import Port
from qexport.errors import InputError
from qexport.recipe.recipe import CalibrationSpec

PORT = Port("input_features", "input_features", torch.float32, ("batch_size", "sequence_length", 3), (2, 9, 3))
ROWS = [torch.randn(length, 3) for length in (4, 7, 2)]
PADDED = torch.nn.utils.rnn.pad_sequence(ROWS, batch_first=True)
MASK = torch.arange(7) < torch.tensor([[4], [7], [2]])


def spec(source="random", samples=3):
    return CalibrationSpec(source=str(source), samples=samples)


def same(got, rows=tuple(ROWS)):
    return len(got) == len(rows) and all(torch.equal(*pair) for pair in zip(got, rows, strict=True))


def test_they_come_in_a_list_or_padded_beside_their_mask_or_in_a_file(tmp_path):
    padded = {"input_features": PADDED, "attention_mask": MASK.long()}
    assert same(sources_of_lengths(PORT, spec(), ROWS, "given")[0])
    rows, described = sources_of_lengths(PORT, spec(samples=2), padded, "given")
    assert same(rows, ROWS[:2]) and described == "2 given"
    save_file(padded, tmp_path / "sound.safetensors")
    rows, described = sources_of_lengths(PORT, spec(tmp_path / "sound.safetensors"), None, "given")
    assert same(rows) and described == "3 input_features of sound.safetensors"


def test_rows_of_one_length_and_chance_are_none_of_them(tmp_path):
    save_file({"any": PADDED}, tmp_path / "sound.safetensors")
    for source, data in (("random", None), (tmp_path / "sound.safetensors", None), ("random", PADDED)):
        assert sources_of_lengths(PORT, spec(source), data, "given") == (None, "")


@pytest.mark.parametrize(
    "data, why",
    [
        ([torch.zeros(4, 2)], r"\[1, 4, 2\], not \[n, sequence_length, 3\]"),
        (["text"], "is str"),
        ({"input_features": PADDED, "attention_mask": MASK[:, :5]}, "does not say of each of 3 rows of 7"),
        ({"input_features": PADDED, "attention_mask": MASK & False}, "does not say of each"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(data, why):
    with pytest.raises(InputError, match=why):
        sources_of_lengths(PORT, spec(), data, "given")
