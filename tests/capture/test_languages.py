"""Adapters for several languages: one of them, for all rows."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qexport.capture.languages import one_language
from qexport.errors import CaptureError


class Part(nn.Module):
    """As X-MOD has it: rows of a batch by their languages."""

    def __init__(self):
        super().__init__()
        self.adapter_modules = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("aa", "bb")})

    def forward(self, x, before, languages):
        return self.lang_adapter(languages, x + before)

    def lang_adapter(self, languages, x):
        made = torch.zeros_like(x)
        for number, adapter in enumerate(self.adapter_modules.values()):
            made[languages == number] = adapter(x[languages == number])
        return made


def model_of(language):
    model = nn.Sequential(Part())
    model.config = SimpleNamespace(default_language=language)
    return model


def test_all_rows_are_of_the_language_of_the_config():
    model, x = model_of("bb"), torch.randn(3, 2)
    want = model[0](x, x, torch.ones(3))
    with one_language(model, "model") as notes:
        assert torch.equal(model[0](x, x, torch.zeros(3)), want)
        assert [name for name, _ in model.named_parameters()][0] == "0.adapter_modules.bb.weight"
        program = torch.export.export(model[0], (x, x, torch.zeros(3)), strict=False)
    assert torch.equal(program.module()(x, x, torch.zeros(3)), want)
    assert "reads bb, one of 2 languages" in notes[0]
    assert list(model[0].adapter_modules) == ["aa", "bb"] and not torch.equal(model[0](x, x, torch.zeros(3)), want)


def test_a_model_without_them_is_as_it_is_and_an_unknown_language_is_refused():
    with one_language(nn.Linear(2, 2), "model") as notes:
        assert notes == []
    known = pytest.raises(CaptureError, match="adapters for 2 languages.*cc.*one of aa, bb")
    with known, one_language(model_of("cc"), "model"):
        pass
