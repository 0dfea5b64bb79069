from types import SimpleNamespace

import pytest
import torch

from helpers.noise import Noisy
from qexport.calibrate.fisher import _SEED, Carried, Importance, felt
from qexport.calibrate.float_model import running
from qexport.device import HOST
from qexport.graph.edit import get_tensor
from qexport.mixed_precision.costs import _drawn_rows, scheme_costs
from qexport.plan.model_plan import plan_for
from qexport.quant.formats import Scheme
from qexport.recipe.recipe import Recipe
from qexport.validation.reference import FloatOutputs, decoder_feeds

FAMILIES = ("llama", "gemma2", "opt", "gpt_neox")


def windows(count, length, seed=0):
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))


def gradients(captured, feeds):
    """Squared gradients of the log-likelihood of drawn tokens for every linear's result, all blocks in one graph."""
    draws, found = torch.Generator().manual_seed(_SEED), {}
    for batch in feeds:
        noise, values = {}, {port.value: batch[port.name] for port in captured.inputs}
        with running(captured, HOST):
            for block in captured.blocks:
                given = dict(
                    zip([n for n in block.module.graph.nodes if n.op == "placeholder"], block.inputs, strict=True)
                )
                results = Noisy(block.module, noise).run(*(values[given[n]] for n in given))
                values |= dict(zip(block.outputs, results, strict=True))
            logits = values[next(port.value for port in captured.outputs if port.name == "logits")]
            likely = torch.log_softmax(logits.flatten(0, 1), -1)
            picked = torch.multinomial(likely.detach().exp(), 1, generator=draws)
            (-likely.gather(1, picked).sum()).backward()
        for name, zeros in noise.items():
            found.setdefault(name, []).append(zeros.grad.flatten(0, -2).square())
    return {name: torch.cat(squares) for name, squares in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_block_by_block_is_the_gradient_of_the_whole_model(captured, family):
    model = captured(family)
    feeds = decoder_feeds(model, windows(2, 12))
    wanted, seen = gradients(model, feeds), []
    for found in felt(model, feeds):
        for linear, x, importance in found.linears:
            squares = wanted[linear.name]
            assert x.shape == (24, linear.shape[1])
            torch.testing.assert_close(importance.rows, squares.sum(1), rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(importance.columns, squares.sum(0) / squares.sum(), rtol=1e-3, atol=1e-6)
            seen.append(linear.name)
    assert sorted(seen) == sorted(wanted)


def test_an_error_of_one_row_and_channel_costs_half_its_square_times_both_shares():
    importance = Importance(torch.tensor([2.0, 0.0]), torch.tensor([0.25, 0.75]))
    assert importance.kl(torch.tensor([[0.0, 4.0], [0.0, 0.0]])) == pytest.approx(16 * 2 * 0.75 / 2 / 2)
    assert importance.kl(torch.tensor([[0.0, 0.0], [9.0, torch.inf]])) == 0  # nobody listens to that row


def test_the_cost_of_a_weight_is_the_mean_over_independent_errors():
    random = torch.Generator().manual_seed(0)
    x, rows = torch.randn(40, 16, generator=random), torch.rand(40, generator=random)
    columns = torch.softmax(torch.randn(8, generator=random), 0)
    importance, size = Importance(rows, columns), torch.rand(8, 16, generator=random)
    signs = [torch.randint(0, 2, (8, 16), generator=random) * 2 - 1 for _ in range(600)]
    mean = sum(importance.kl(x @ (size * sign).T) for sign in signs) / len(signs)
    assert importance.kl_of_weight(importance.of_features(x), size) == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize("method", ("rtn", "gptq"))
def test_the_price_of_a_scheme_is_of_the_ranges_that_it_will_have(captured, method):
    model = captured("llama")
    schemes = [Scheme.parse(name) for name in ("w3a16_g16_s8", "w4a16_g16_asym_s8")]
    recipe = Recipe(scheme="w4a16_g16", weights={"method": method, "clip_search": True})
    plan, _ = plan_for(model, recipe, 4)
    feeds = decoder_feeds(model, windows(1, 8))
    plain, narrowed = (scheme_costs(model, plan, [], schemes, feeds, method=m).kl for m in (None, recipe.weights))
    for found in felt(model, feeds):
        for linear, x, importance in (site for site in found.linears if site[0].name in plain):
            w, features, shares = get_tensor(found.block.module, linear.weight), importance.of_features(x), []
            for scheme in schemes:
                scales = scheme.weight.clipped_scales(w, features if method == "gptq" else None)
                error = scheme.weight.decode(scheme.weight.encode(w, *scales), *scales) - w
                shares.append(narrowed[linear.name][scheme.name] / plain[linear.name][scheme.name])
                exact = importance.kl_of_weight(features, error) / plain[linear.name][scheme.name]
                assert shares[-1] == pytest.approx(exact, rel=0.15)  # some rows say it
            if method == "gptq":
                assert shares[0] < shares[1] < 1  # narrower ranges gain most where a range has a side too many


def test_rows_that_count_more_are_drawn_more_often():
    columns = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25])
    assert torch.bincount(_drawn_rows(columns), minlength=5).tolist() == [0, 12, 0, 6, 6]
    assert _drawn_rows(torch.zeros(3)).tolist() == [2] * 24  # nothing is felt: any will do


@pytest.mark.parametrize("family", ("llama", "gemma2"))
def test_costs_foretell_the_kl_that_small_errors_make(captured, family):
    """The sum over all linears of what noise in their weights costs, and what it does."""
    model = captured(family)
    feeds = decoder_feeds(model, windows(16, 24, seed=1))
    noise, random, foretold = {}, torch.Generator().manual_seed(2), 0.0
    for found in felt(model, feeds):
        for linear, x, importance in found.linears:
            weight = get_tensor(found.block.module, linear.weight)
            noise[linear.weight] = 2e-3 * weight.std() * torch.randn(weight.shape, generator=random)
            foretold += importance.kl_of_weight(importance.of_features(x), noise[linear.weight])
    plain = FloatOutputs(model, feeds, ("logits",))
    want = [plain.outputs(batch)["logits"][0] for batch in range(len(feeds))]
    plain.close()
    load = model.weights.load
    model.weights = SimpleNamespace(load=lambda name: load(name) + noise.get(name, 0))  # copies share the one it had
    moved = FloatOutputs(model, feeds, ("logits",))
    got = [moved.outputs(batch)["logits"][0] for batch in range(len(feeds))]
    p, q = (torch.log_softmax(torch.cat(logits).double(), -1) for logits in (want, got))
    measured = float((p.exp() * (p - q)).sum(-1).mean())
    assert foretold == pytest.approx(measured, rel=0.35)


def test_only_tokens_that_count_have_costs(captured):
    model = captured("llama")
    feeds = decoder_feeds(model, windows(2, 9))
    counts = torch.arange(9)[None] < 5  # what is behind reads these, and is not judged
    given = {"all": None, "some": [counts] * 2, "none": [counts & False] * 2}
    found = {}
    for name, counted in given.items():
        blocks = felt(model, feeds, carried=Carried(frozenset(), 10, counted))
        found[name] = {linear.name: sums.rows.view(2, 9) for block in blocks for linear, _, sums in block.linears}
    for name, rows in found["some"].items():
        assert rows[:, 1:5].min() > 0 and not rows[:, 5:].any() and not found["none"][name].any()
    assert all(rows[:, 5:].any() for rows in found["all"].values())
