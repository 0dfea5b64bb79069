import json
import math

import onnx
import pytest
import torch

from helpers.random_decoders import save_model
from helpers.tokenizer_files import write_word_tokenizer
from qexport.api.auto import export_auto
from qexport.artifact.manifest import load
from qexport.calibrate.fisher import Importance, KeptRows, felt
from qexport.errors import InputError
from qexport.formatting import megabytes
from qexport.mixed_precision.allocate import SchemeChoice
from qexport.mixed_precision.allocator import SchemeAllocator
from qexport.mixed_precision.caches import CacheChoice, CountedCache, numbers_a_token
from qexport.recipe.recipe import Recipe
from qexport.recipe.registry import section
from qexport.validation.reference import decoder_feeds

TEXT = " ".join(f"w{i * i % 97}" for i in range(600))
RTN = Recipe(scheme="w4a16_g16", lm_head="w4a16_g16", embedding="tied").with_calibration(samples=4, sequence_length=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model("llama_bias", tmp_path_factory.mktemp("tied"), intermediate_size=512)
    write_word_tokenizer(folder, 128)
    return folder


def test_keys_and_values_are_as_important_as_what_makes_them(captured):
    """A value is what its linear makes, and a key that turned: both have the same gradients, row by row."""
    feeds = decoder_feeds(captured("llama"), torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0)))
    blocks = [found for found in felt(captured("llama"), feeds, caches=True) if found.kept]
    for found in blocks:
        linears = {linear.name.rpartition(".")[2]: importance for linear, _, importance in found.linears}
        keys, values = found.kept
        torch.testing.assert_close(values.importance.rows, linears["v_proj"].rows)
        torch.testing.assert_close(values.importance.columns, linears["v_proj"].columns)
        torch.testing.assert_close(keys.importance.rows, linears["k_proj"].rows)
        assert keys.by_head.shape == (1, keys.heads, 24, keys.rows.shape[1] // keys.heads)
        torch.testing.assert_close(keys.by_head[0, 1, 5], keys.rows[5].chunk(keys.heads)[1])
    assert len(blocks) == 2
    assert not any(found.kept for found in felt(captured("llama"), feeds))


def test_the_price_of_a_cache_is_that_of_its_rounding():
    random = torch.Generator().manual_seed(1)
    importance = Importance(torch.rand(40, generator=random), torch.softmax(torch.randn(8, generator=random), 0))
    kept = KeptRows(torch.randn(40, 8, generator=random) * torch.tensor([1.0, 9.0]).repeat(4), 2, importance)
    costs = {}
    for bits in (8, 4):
        scale = kept.rows.abs().amax(0) / (2 ** (bits - 1) - 1)
        error = (torch.round(kept.rows / scale) * scale - kept.rows).double()
        wanted = float(((error.square() * importance.columns).sum(1) * importance.rows).mean() / 2)
        costs[bits] = kept.kl(section("kv_cache", bits=bits).rounded(kept.by_head))
        assert costs[bits] == pytest.approx(wanted, rel=1e-4)
    assert 50 < costs[4] / costs[8] < 1000  # steps are 127 / 7 as wide: about 330
    one = section("kv_cache", bits=4, scales="tensor").rounded(kept.by_head)
    assert kept.kl(one) > costs[4]


class Priced:
    """Two linears, and a cache that floats, 8 or 4 bits hold."""

    class costs:  # noqa: N801
        importance, items = {}, (None, None)

    quantizes, rest, guessed = True, 0, 0
    choices = [(SchemeChoice("4", 100, 0.4), SchemeChoice("8", 200, 0.01))] * 2
    caches = tuple(CacheChoice(None, *of) for of in (("floats", 800, 0.0), ("int8", 200, 0.02), ("int4", 100, 0.6)))
    recipe = RTN


@pytest.mark.parametrize("most, schemes, cache", [
    (1200, ["8", "8"], "floats"), (1199, ["8", "8"], "int8"), (599, ["4", "8"], "int8"), (499, ["4", "4"], "int8"),
    (399, ["4", "4"], "int4"),
])  # fmt: skip
def test_bytes_go_to_weights_or_to_the_cache(most, schemes, cache):
    found = SchemeAllocator([Priced()]).within_bytes(most)
    assert (sorted(found.schemes), found.cache.numbers) == (schemes, cache)


def test_a_kl_takes_the_fewest_bytes_of_both():
    chooser = SchemeAllocator([Priced()])
    for most in (0.03, 0.05, 0.45, 0.65, 0.9, 1.45):
        found = chooser.within_kl(most)
        every = [
            (sum(c.bytes for c in pair) + cache.bytes, sum(c.kl for c in pair) + cache.kl)
            for pair in ((a, b) for a in Priced.choices[0] for b in Priced.choices[1])
            for cache in Priced.caches
        ]
        assert chooser.foretold(found) <= most + 1e-9
        assert chooser.bytes(found) == min(size for size, kl in every if kl <= most + 1e-9)


def test_bytes_of_a_cache_are_of_every_layer_and_head(captured):
    model = captured("llama")
    config = model.origin.config
    size = config.hidden_size // config.num_attention_heads
    assert numbers_a_token(model) == 2 * config.num_hidden_layers * config.num_key_value_heads * size
    counted = CountedCache(10, [section("kv_cache", bits=8), section("kv_cache", numbers="e4m3")], True, 32, False)
    found = counted.choices(model, [0.1, 0.2])
    assert [choice.bytes for choice in found] == [10 * numbers_a_token(model) * width for width in (4, 1, 4)]
    assert [choice.kl for choice in found] == [0, 0.1, 0.2]


def test_the_command_counts_a_cache_and_chooses_its_bits(model, tmp_path, run):
    recipe, text = tmp_path / "r.yaml", tmp_path / "t.txt"
    recipe.write_text(RTN.to_yaml())
    text.write_text(TEXT)
    code, said, problem = run(
        "export", model, "-o", tmp_path / "auto", "-r", recipe, "--max-bytes", "240kB", "--context", 128,
        "--calibration", text, "--text", text,
    )  # fmt: skip
    assert code == 0, problem
    kept = json.loads((tmp_path / "auto" / "report.json").read_text())["auto"]
    bits = {"int8": 8, "int4": 4}[kept["cache"]["numbers"]]  # floats alone take more
    manifest = load(tmp_path / "auto")
    assert manifest.settings["kv_cache_bits"] == bits
    assert Recipe.load(tmp_path / "auto" / "recipe.yaml").given["kv_cache"] == section("kv_cache", bits=bits)
    assert kept["bytes"] + kept["cache"]["bytes"] <= 240_000 and kept["asked"]["context"] == 128
    graph = onnx.load(tmp_path / "auto" / "model.onnx", load_external_data=False).graph
    pasts = [value.type.tensor_type for value in graph.input if value.name.startswith("past_key_values.")]
    assert {past.elem_type for past in pasts} <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    a_token = sum(math.prod(dim.dim_value or 1 for dim in past.shape.dim) for past in pasts)
    assert kept["cache"]["bytes"] == 128 * a_token
    assert f"cache of 128 tokens: {megabytes(kept['cache']['bytes'])} in int{bits}" in said
    code, said, problem = run("inspect", model, "-r", f"w4a16_g16_kv{bits}")
    assert code == 0, problem
    assert f"Keys and values take {a_token:,} bytes a token, in int{bits}" in said


@pytest.mark.parametrize("context, says", [(0, "0 tokens"), (10**6, "1,000,000 tokens")])
def test_a_text_that_the_model_does_not_read_is_refused(model, tmp_path, context, says):
    with pytest.raises(InputError, match=says):
        export_auto(model, RTN, out_dir=tmp_path / "auto", max_bytes=10**6, context=context, calibration="random")
    assert not list(tmp_path.iterdir())


def test_once_a_graph_was_measured_others_may_be_a_little_larger():
    chooser = SchemeAllocator([Priced()])
    assert chooser.within_bytes(1200).cache.numbers == "floats"
    chooser.wrong_by(0)
    assert chooser.within_bytes(1200 + 199).cache.numbers == "int8"  # of two linears
    assert chooser.within_bytes(1200 + 200).cache.numbers == "floats"
