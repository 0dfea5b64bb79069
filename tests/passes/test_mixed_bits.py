"""SliM-LLM, PB-LLM and DiffQ: which groups get how many bits; files compute what graphs say, in the scheme's bytes."""

import pytest
import torch

from helpers.agreement import assert_agree, export
from helpers.runners import padded
from qexport.passes.weights.pb_llm import PB
from qexport.passes.weights.slim_llm import bits_by_salience
from qexport.plan.linear_plan import LinearPlan, weight_bytes
from qexport.quant.formats import IntegerFormat, Scheme
from qexport.quant.formats.midrise import Midrise
from qexport.quant.formats.mixed_bits import MixedBits
from qexport.quant.hessian import factorize
from qexport.recipe.recipe import CalibrationSpec, Recipe
from qexport.recipe.registry import section
from qexport.runtime.session import optimized_graph, unfused

FMT = IntegerFormat(3, 16)
LINEAR = None  # these two look at the weight alone
KEYS = {"diffq": {"steps": 2}}


def example():
    """A weight of 8 groups, and the factor of a Hessian of inputs of very different sizes."""
    random = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0.7, -0.7, 8)[torch.randperm(8, generator=random)].repeat_interleave(16)
    x = torch.randn(400, 128, generator=random) * sizes
    return torch.randn(12, 128, generator=random), factorize(x.t() @ x / 200, 0.01, act_order=True)


def slowly(w, factor):
    """The bits by trying every number of groups, with the factor of H^-1 written out, in float64."""
    upper = torch.zeros(128, dtype=torch.float64)
    for place, feature in enumerate(factor.order.tolist()):  # U[i, i] = reversed[K - 1 - i, K - 1 - i]
        upper[feature] = float(factor.reversed[127 - place, 127 - place]) ** 2
    salient, errors = [], {}
    for group in range(8):
        part, own = w[:, 16 * group : 16 * group + 16], upper[16 * group : 16 * group + 16]
        salient.append(float((part.double().square() / own).sum()))
        for bits in (2, 3, 4):
            fmt = Midrise(bits, 16) if bits <= 2 else IntegerFormat(bits, 16)
            scale, _ = fmt.clipped_scales(part, (1 / own).float())
            off = fmt.decode(fmt.encode(part, scale, None), scale, None).double() - part
            errors[group, bits] = float((off.square() / own).sum())
    order, found = sorted(range(8), key=salient.__getitem__), []
    for moved in range(5):
        bits = [3] * 8
        for low, high in zip(order[:moved], order[8 - moved :], strict=True):
            bits[low], bits[high] = 2, 4
        found.append((sum(errors[g, b] for g, b in enumerate(bits)), bits))
    return min(found)[1]


def test_bits_go_from_the_least_salient_groups_to_the_most_salient_ones():
    w, factor = example()
    bits = bits_by_salience(w, factor.squared_pivots, FMT)
    assert bits == slowly(w, factor) and sum(bits) == 24 and len(set(bits)) > 1


def test_a_tenth_of_the_groups_has_8_bits_and_others_have_a_sign():
    w, factor = example()
    mixed = PB({}, salient=0.3).grid(LINEAR, w, Scheme.parse("w3a16_g16").weight, factor)
    assert isinstance(mixed, MixedBits) and sorted(mixed.group_bits) == [1] * 6 + [8] * 2
    fewer = PB({}, salient=0.3).grid(LINEAR, w, Scheme.parse("w2a16_g16_mid").weight, factor)
    assert sum(fewer.group_bits) <= 16  # the bits of the scheme
    assert PB({}, salient=0.3).grid(LINEAR, w, Scheme.parse("nf4").weight, factor) == Scheme.parse("nf4").weight


@pytest.mark.parametrize(
    ("scheme", "method"), [("w3a16_g16_s8", "slim_llm"), ("w2a16_g16_mid", "pb_llm"), ("w3a16_g16_s8", "diffq")]
)
def test_the_file_computes_what_the_graph_says_in_the_bytes_of_the_scheme(captured, tmp_path, scheme, method):
    weights = section("weights", method=method, clip_search=True, **KEYS.get(method, {}))
    recipe = Recipe(
        scheme=scheme, lm_head=scheme, accuracy_level=1, weights=weights,
        calibration=CalibrationSpec(source="random", samples=2, sequence_length=16),
    )  # fmt: skip
    exported = export(captured("llama"), recipe, "cpu", tmp_path / "out")
    assert_agree(exported, padded([9, 4, 6], "left"), flips=0)
    for entry in exported.manifest.linears:
        planned = weight_bytes(LinearPlan(entry.name, entry.block, entry.shape, Scheme.parse(entry.scheme)))
        assert entry.bytes == planned if method != "pb_llm" else entry.bytes <= planned
    graph = optimized_graph(exported.folder, exported.manifest)
    assert unfused(graph, exported.manifest.linears) == [] and "BitwiseOr" not in graph.op_counts()
