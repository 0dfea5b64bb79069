import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.api.exporting import export
from qexport.api.stages.capturing import capture_model
from qexport.api.validating import validate
from qexport.artifact import manifest as manifests
from qexport.artifact.manifest import BlockEntry
from qexport.calibrate.block_activations import module_feeds
from qexport.errors import InputError
from qexport.recipe.recipe import Recipe
from qexport.runtime.session import optimized_graph
from qexport.validation import probes as reading
from qexport.validation.layers import compare_layers
from qexport.validation.probes import Probe, in_groups, make_probes
from qexport.validation.reference import FloatOutputs, TeacherForcing, decoder_feeds, watch
from qexport.validation.running import with_outputs


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 100))
@settings(deadline=None, max_examples=50)
def test_groups_keep_the_order_and_the_budget(sizes, budget):
    found = [Probe(str(i), (), BlockEntry(name=str(i), output=str(i)), size) for i, size in enumerate(sizes)]
    groups = in_groups(found, budget)
    assert [probe for group in groups for probe in group] == found
    assert all(len(group) == 1 or sum(probe.bytes for probe in group) <= budget for group in groups)
    for first, second in zip(groups, groups[1:], strict=False):
        assert sum(p.bytes for p in first) + second[0].bytes > budget, "as few sessions as possible"


def test_blocks_without_values_need_no_session():
    assert in_groups([Probe("prologue", (), None, 0)], 10) == []


@pytest.fixture(scope="module")
def decoder(model_folder, export_folder):
    """(captured, folder, manifest) of a random Llama of two layers."""
    out = export_folder("llama", Recipe(scheme="w4a16_g32"))
    return capture_model(model_folder("llama")), out, manifests.load(out)


def feeds_of(captured):
    ids = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(0))
    return decoder_feeds(captured, ids)


def test_a_small_budget_gives_the_same_rows_block_by_block(decoder, monkeypatch):
    captured, folder, manifest = decoder
    graph, asked = optimized_graph(folder, manifest), []
    real = reading.run_values
    monkeypatch.setattr(
        reading, "run_values", lambda f, m, values, **rest: asked.append(list(values)) or real(f, m, values, **rest)
    )
    options = dict(rows=20, transformed=False)
    whole = compare_layers(folder, manifest, captured, feeds_of(captured), graph, **options)
    assert whole.sessions == len(asked) == 1
    pieces = compare_layers(folder, manifest, captured, feeds_of(captured), graph, budget=1, **options)
    with_values = [probe for probe in make_probes(captured, manifest, 20) if probe.values()]
    assert asked[1:] == [probe.values() for probe in with_values], "one block's values at a time"
    assert pieces.sessions == len(with_values) > 2
    assert pieces.linears == whole.linears and pieces.blocks == whole.blocks


def test_probe_sizes_are_the_bytes_of_the_values(decoder):
    captured, folder, manifest = decoder
    by_block = {probe.block: probe.bytes for probe in make_probes(captured, manifest, 20)}
    # q, o, down, and the block's output: 64; k, v: 32; gate, up: 96 channels; 20 tokens of float32.
    # What they read: once for q, k and v, once for o, once for gate and up, 64 each; and 96 for down.
    assert by_block["model.layers.0"] == 4 * 20 * (4 * 64 + 2 * 32 + 2 * 96 + 3 * 64 + 96)


def test_one_block_of_weights_is_in_memory_at_a_time(decoder):
    captured = decoder[0]

    def loaded():
        return [b.name for b in captured.blocks if any(t.device.type == "cpu" for t in b.module.buffers())]

    real, most = captured.load, []

    def load(name):
        most.append(len(loaded()))
        return real(name)

    captured.load = load
    try:
        for _ in watch(captured, feeds_of(captured), set(), lambda block: TeacherForcing(None, {})):
            assert loaded() == []
        reference = FloatOutputs(captured, feeds_of(captured), ("logits",))
        assert max(most) == 1 and loaded() == [captured.blocks[-1].name]
        reference.close()
        assert loaded() == []
    finally:
        del captured.load


def test_forced_values_reach_what_is_behind_them(decoder):
    """A linear and a block are judged on what they are given: zeros in front change what the float model makes."""
    captured, name = decoder[0], "model.layers.1.self_attn.o_proj"
    wanted = {name, "model.layers.1.mlp.up_proj"}
    for seen in watch(
        captured, feeds_of(captured), wanted, lambda block: TeacherForcing(None, {name: [torch.zeros(1, 20, 64)]})
    ):
        assert all(torch.equal(a, b) for a, b in zip(seen.output, seen.own_output, strict=True))
        if seen.linears:
            assert torch.equal(seen.linears[name][0], seen.own_linears[name][0]), "nothing in front of it is forced"
            assert not torch.equal(*(v["model.layers.1.mlp.up_proj"][0] for v in (seen.linears, seen.own_linears)))
    state, last = [torch.zeros(1, 20, 64)], "model.layers.1"
    for seen in watch(
        captured, feeds_of(captured), wanted, lambda block: TeacherForcing(state if block.name == last else None, {})
    ):
        if seen.block.name == last:
            # Zeros through norms without bias stay zeros, so the residual stream does.
            assert not seen.own_output[0].any() and seen.output[0].any()
            assert not seen.own_linears[name][0].any()


def test_a_value_that_is_not_in_the_graph_is_an_input_error(decoder):
    with pytest.raises(InputError, match="no value nowhere"):
        with_outputs(decoder[1], ["nowhere"])


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(3))
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(x), x.mean(1)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    torch.manual_seed(0)
    net, out = Net().eval(), tmp_path_factory.mktemp("module") / "out"
    export(net, Recipe(scheme="w4a16_g32", accuracy_level=1), out_dir=out, example_inputs=(torch.randn(2, 5, 64),))
    return net, out


def test_a_module_is_compared_on_tensors(module):
    net, out = module
    inputs = [(torch.randn(n, 5, 64),) for n in (1, 3)]
    report = validate(out, net, inputs=inputs)
    assert report.logits is None and not report.problems
    assert len(report.layers.linears) == 4 and report.layers.tokens == 4
    assert [row.name for row in report.outputs] == ["output_0", "output_1"]
    session_rows = {row.name: row for row in report.outputs}
    head = next(row for row in report.layers.linears if row.name == "head")
    # The head makes output_0, over the same inputs.
    assert session_rows["output_0"].sqnr_db == pytest.approx(head.sqnr_db, abs=1e-6)
    assert 15 < head.sqnr_db < 45


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([(torch.zeros(1, 5, 64), torch.zeros(1))], "2 tensors, but the model takes 1"),
        ([(torch.zeros(1, 5, 32),)], r"is torch.float32 \[1, 5, 32\], not torch.float32"),
        ([(torch.zeros(1, 5, 64, dtype=torch.int64),)], "is torch.int64"),
    ],
)
def test_inputs_that_do_not_fit(module, inputs, message):
    captured = capture_model(module[0], (torch.randn(2, 5, 64),))
    with pytest.raises(InputError, match=message):
        module_feeds(captured, inputs, "inputs")


def test_a_module_without_inputs_is_refused(module):
    with pytest.raises(InputError, match="Pass inputs"):
        validate(module[1], module[0])


def test_a_module_has_no_references(module):
    with pytest.raises(InputError, match="references are only for language models"):
        validate(module[1], module[0], inputs=[(torch.zeros(1, 5, 64),)], references=True)
