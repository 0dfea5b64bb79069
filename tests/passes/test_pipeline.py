"""A pipeline runs passes in order, holds them to their promises and names the one that broke them."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from helpers.pass_runs import block_of
from qexport.errors import NumericsError, PassError
from qexport.graph.edit import set_tensor
from qexport.graph.sites import linears
from qexport.passes.base import GraphPass, PassResult, Pipeline, SiteRecord


@dataclass(frozen=True)
class Scale(GraphPass):
    """Multiplies every weight."""

    factor: float = 1.0
    preserves_output: ClassVar[bool] = True

    def call(self, module, context):
        for linear in linears(module.graph):
            set_tensor(module, linear.weight, module.get_buffer(linear.weight) * self.factor)
        return PassResult(changed=[SiteRecord(linear.name, "scaled") for linear in linears(module.graph)])


@dataclass(frozen=True)
class ScaleOpenly(Scale):
    preserves_output: ClassVar[bool] = False


@dataclass(frozen=True)
class Refuse(GraphPass):
    def requires(self, module):
        raise PassError("does not like this graph", remedy="Take another one")

    def call(self, module, context):
        raise AssertionError("called though refused")


@dataclass(frozen=True)
class Stumble(GraphPass):
    def call(self, module, context):
        raise NumericsError("meets a NaN")


@dataclass(frozen=True)
class Watch(GraphPass):
    def statistics(self, module):
        return {linear.input: list for linear in linears(module.graph)}

    def call(self, module, context):
        return PassResult(changed=[SiteRecord(node.name, str(value)) for node, value in context.statistics.items()])


@pytest.fixture
def block():
    return block_of(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))


SAMPLE = (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)),)


def nothing(module, wanted):
    raise AssertionError("no pass asked for statistics")


def test_results_come_by_pass_in_order(block):
    results = Pipeline([Scale(1.0), ScaleOpenly(2.0)]).run(block, nothing, SAMPLE)
    assert list(results) == ["Scale", "ScaleOpenly"]
    assert [note.site for note in results["Scale"].changed] == ["0", "2"]


def test_a_broken_promise_names_the_pass_and_those_before_it(block):
    with pytest.raises(PassError) as caught:
        Pipeline([ScaleOpenly(2.0), Scale(1.01)]).run(block, nothing, SAMPLE)
    assert caught.value.place == "pass Scale"
    assert "moved by" in caught.value.message and "passes before it: ScaleOpenly" in caught.value.message


def test_a_promise_is_kept_to_rounding(block):
    Pipeline([Scale(1 + 1e-7)]).run(block, nothing, SAMPLE)


def test_nan_breaks_a_promise(block):
    with pytest.raises(PassError, match="moved by nan"):
        Pipeline([Scale(float("nan"))]).run(block, nothing, SAMPLE)


def test_without_a_sample_a_promise_is_not_checked(block):
    Pipeline([Scale(3.0)]).run(block, nothing)


def test_a_refusal_names_the_pass_and_keeps_its_remedy(block):
    with pytest.raises(PassError) as caught:
        Pipeline([Refuse()]).run(block, nothing, SAMPLE)
    assert str(caught.value) == "pass Refuse: does not like this graph (passes before it: none). Take another one"


def test_another_kind_of_error_keeps_its_kind(block):
    with pytest.raises(NumericsError, match="meets a NaN") as caught:
        Pipeline([Scale(), Stumble()]).run(block, nothing, SAMPLE)
    assert caught.value.place == "pass Stumble"


def test_statistics_are_collected_for_the_pass_that_asks(block):
    asked = []

    def collect(module, wanted):
        asked.append({node.name: factory() for node, factory in wanted.items()})
        return {node: node.name for node in wanted}

    results = Pipeline([Scale(), Watch()]).run(block, collect, SAMPLE)
    assert asked == [{"input_1": [], "relu_default": []}]
    assert {note.site for note in results["Watch"].changed} == {"input_1", "relu_default"}
