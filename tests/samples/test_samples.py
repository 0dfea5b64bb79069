"""The samples run as they are written, on a model that is small enough."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import qexport
from helpers import coded_checkpoints as packers
from helpers.random_decoders import save_model
from helpers.random_modules import save_encoder
from helpers.tokenizer_files import write_word_tokenizer
from qexport.errors import PassError
from qexport.models.coded.grids import StoredGrid
from qexport.models.coded.paretoq import ClippedWeight

SAMPLES = Path(__file__).parents[2] / "samples"
VOCAB, WINDOW = 98, 256


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = save_model(
        "llama", tmp_path_factory.mktemp("model") / "tiny", vocab_size=VOCAB, max_position_embeddings=2 * WINDOW
    )
    write_word_tokenizer(folder, VOCAB)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"{n} bottles of beer on the wall, {n} bottles of beer." for n in range(100, 0, -1)))
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(name, *arguments) -> what the sample prints; it writes below tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run_sample(name, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(SAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_sample


def sample(name: str) -> dict:
    return runpy.run_path(str(SAMPLES / name))


def test_quickstart(run, model, text):
    out = run("quickstart.py", model, text)
    assert "14 linears quantized" in out and "perplexity goes from" in out and "The three primary colours are" in out


@pytest.mark.slow
def test_temperature_distance(run, model, tmp_path):
    folders = [tmp_path / "far", tmp_path / "near"]
    for folder, scheme in zip(folders, ("w4a16_g32", "w8a16_g32"), strict=True):
        recipe = qexport.Recipe(scheme=scheme)
        qexport.export(model, recipe, out_dir=folder)
    passages = tmp_path / "passages.txt"
    passages.write_text("\n".join(" ".join(f"w{(i * j) % 97}" for j in range(1, 99)) for i in range(1, 9)))
    out = run(
        "temperature_distance.py", model, *folders, "--text", passages, "--prompts", 6, "--prompt-tokens", 8,
        "--tokens", 4, "--temperatures", 0.5, 1.0,
    )  # fmt: skip
    rows = [line for line in out.splitlines() if line.startswith(("| far", "| near"))]
    assert len(rows) == 8 and out.count("over 6 passages of 4 tokens") == 2
    far, near = (float(row.split("|")[2].split("±")[0]) for row in rows[:2])
    assert 0 < near < far < 1


@pytest.mark.slow
def test_vision_language(run, tmp_path):
    out = run("vision_language.py", "--kinds", "internvl", "-o", tmp_path / "table.md")
    row = next(line for line in out.splitlines() if line.startswith("| internvl")).split("|")
    assert row[2].strip() == "4" and float(row[3]) < 1e-5 and float(row[4]) < 1e-4
    assert all(float(cell) > 25 for cell in row[5:8]) and row[8].strip() == "grouped"
    assert (tmp_path / "table.md").read_text().startswith("# Models of pictures and text")


@pytest.mark.slow
def test_every_scheme(run, model, text):
    recipes = ["w4a16_g32_rtn", "w8a8_dyn"]
    lines = run(
        "every_scheme.py", model, "--text", text, "--samples", 2, "--length", 64, "--recipes", *recipes
    ).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert list(rows) == recipes
    # 4 bits are further from the float model than 8.
    assert float(rows["w4a16_g32_rtn"][1]) > float(rows["w8a8_dyn"][1]) > 0


@pytest.mark.slow
def test_experts_speed(run):
    small = [f"--{name}={size}" for name, size in dict(layers=1, hidden=64, inner=64, experts=4, chosen=2).items()]
    lines = run("experts_speed.py", *small, "--repeats", 1).splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == [
        "prompt of 16", "prompt of 128", "prompt of 512", "a token after 128", "file, MB",
    ]  # fmt: skip
    assert all(float(line.split("|")[4].split()[0]) > 0 for line in lines[4:-1])


def test_own_module(run):
    out = run("own_module.py")
    assert "all 10 quantized linears run as MatMulIntegerToFloat" in out
    share = float(out.splitlines()[-1].split("for ")[1].split("%")[0])
    assert share > 90  # 8 bits on random weights: classes differ only where two of them are nearly tied


def test_custom_pass(run, model, text):
    out = run("custom_pass.py", model, text)
    scores = [float(line.split("model ")[1].split(",")[0]) for line in out.splitlines()]
    assert len(scores) == 2 and scores[0] != scores[1] and all(0 < s < 1 for s in scores)


def test_a_pass_of_your_own_is_accounted_for(model, text, tmp_path):
    scale = sample("custom_pass.py")["ScaleByActivation"]
    recipe = qexport.Recipe.load("w4a16_g32_rtn").with_calibration(samples=2, sequence_length=64)
    result = qexport.export(
        model, recipe, out_dir=tmp_path / "out", calibration=str(text), extra_passes=[scale(recipe)]
    )
    assert "2 windows of 64 tokens" in result.calibration, "statistics are taken though the recipe needs none"
    report = (tmp_path / "out" / "report.json").read_text()
    assert report.count('"ScaleByActivation"') >= 2
    with pytest.raises(PassError, match="pass ScaleByActivation.*power 2 is not between 0 and 1"):
        qexport.export(model, recipe, out_dir=tmp_path / "bad", calibration=str(text), extra_passes=[scale(recipe, 2)])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_pass_that_breaks_its_promise_is_caught(model, text, tmp_path):
    from qexport.graph.edit import get_tensor, set_tensor
    from qexport.graph.sites import linears
    from qexport.passes.base import GraphPass, PassResult

    class Shrink(GraphPass):
        preserves_output = True

        def call(self, module, context):
            weight = linears(module.graph)[0].weight
            set_tensor(module, weight, 0.5 * get_tensor(module, weight))
            return PassResult()

    with pytest.raises(PassError, match="Shrink.*moved by"):
        qexport.export(
            model,
            "w4a16_g32_rtn",
            out_dir=tmp_path / "bad",
            calibration=["some text to run on"],
            extra_passes=[Shrink()],
        )


@pytest.mark.slow
def test_a_tied_weight_that_a_pass_changes_is_stored_twice(text, tmp_path):
    tied = save_model("llama", tmp_path / "tied", vocab_size=VOCAB, tie_word_embeddings=True)
    write_word_tokenizer(tied, VOCAB)
    # Scales the output projection, which is the embedding, and then leaves everything in float.
    scaled = qexport.Recipe(scheme="w8a16", lm_head="w8a16")
    untouched = qexport.Recipe(scheme="w8a16", overrides=[{"match": "*", "scheme": "float"}])
    scale = sample("custom_pass.py")["ScaleByActivation"](scaled)
    out = tmp_path / "out"
    qexport.export(tied, untouched, out_dir=out, calibration=[text.read_text()[:200]], extra_passes=[scale])
    assert qexport.validate(out, tied, text=text, windows=2, window=64).logits.kl_mean < 1e-6  # float32 rounding


def test_the_demo_keeps_the_function_of_the_model_it_rewrites(model):
    demo = sample("demo.py")
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.arange(60)[None]
    with torch.no_grad():
        before, weight = llama(ids).logits, llama.model.layers[0].self_attn.q_proj.weight.clone()
        demo["move_factors"](llama, torch.Generator().manual_seed(0))
        after = llama(ids).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert (llama.model.layers[0].self_attn.q_proj.weight / weight - 1).abs().mean() > 0.05


@pytest.mark.slow
def test_methods_table(run, model, text):
    lines = run(
        "methods_table.py", model, "--calibration", text, "--text", text, "--windows", 1, "--window", 32,
        "--samples", 2, "--rows", "w8a8 per-token", "nf4",
    ).splitlines()  # fmt: skip
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["float32", "w8a8 per-token", "nf4"]
    _, per_token, nf4 = rows[2:]
    assert per_token[5].endswith("%") and nf4[5] == ""  # only what quantizes activations has a kernel
    assert all(float(row[column]) > 0 for row in (per_token, nf4) for column in (2, 3, 6, 7))


@pytest.mark.slow
def test_gpu_check_rehearses_on_the_cpu(run, tmp_path):
    out = run(
        "gpu_check.py", "--cpu", "--recipes", "w4a16_g32_rtn", "w8a8_dyn", "--samples", 2, "--window", 16,
        "--prompts", 16, "--pasts", 8, "--repeats", 1, "--out", tmp_path / "check.md", "--bfloat16", "w4a16_g32_rtn",
    )  # fmt: skip
    assert out.strip() == (tmp_path / "check.md").read_text().strip()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:2] == "| "]
    assert [row[0] for row in rows[2:]] == ["w4a16_g32_rtn", "w4a16_g32_rtn, bfloat16", "w8a8_dyn"]
    # The CPU provider runs no bfloat16 file; its graph is as far from the float model as that of the float16 one.
    brain = rows.pop(3)
    near, nearer = (float(cell.rpartition(": ")[2].split(",")[0]) for cell in (brain[2], rows[2][2]))
    assert brain[1] == "CUDA only" and nearer / 2 < near < nearer * 2
    for row in rows[2:]:
        # The file is its graph, up to the rounding of float16; no node was lost and no speed is missing.
        assert len(row) == len(rows[0]) and float(row[1].split(",")[0]) < 1e-3
        assert row[4:6] == ["0", "0"] and all(float(row[i].split()[0].replace(",", "")) > 0 for i in (7, 8, 10))
    assert [row[6] for row in rows[2:]] == ["14 of 14", ""]


@pytest.mark.slow
def test_gpu_check_names_a_recipe_that_fails(run, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(
            "gpu_check.py", "--cpu", "--recipes", "nf4", "--window", 16, "--prompts", 16, "--pasts", 0,
            "--out", tmp_path / "check.md",
        )  # fmt: skip
    assert stopped.value.code == 1 and "| nf4 | failed: " in (tmp_path / "check.md").read_text()


@pytest.mark.parametrize("arguments", [["MODEL"], ["--cpu", "no/such/model"]], ids=["no GPU", "no model"])
def test_gpu_check_that_cannot_begin_says_so_in_a_line(run, capsys, monkeypatch, arguments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run("gpu_check.py", *arguments)
    assert stopped.value.code == 2
    assert len(errors := capsys.readouterr().err.splitlines()) == 1 and errors[0].startswith("error: ")


def test_every_method_of_the_table_is_a_recipe():
    recipes = sample("methods_table.py")["recipes"](samples=3)
    assert len(recipes) > 50 and all(recipe.calibration.samples == 3 for recipe in recipes.values())


@pytest.mark.slow
def test_compare_peers(run, model, text):
    pytest.importorskip("onnxruntime_genai")
    lines = run(
        "compare_peers.py", model, "--text", text, "--windows", 1, "--window", 64, "--recipes", "w4a16_g32_rtn",
        "w8a8_dyn", "--rows", "w4*", "builder int4", "--repeats", 1, "--threads", 1, "--builder", sys.executable,
    ).splitlines()  # fmt: skip
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[0] for row in rows] == ["float32", "w4a16_g32_rtn", "builder int4"]
    assert header[8:] == ["prefill 128", "prefill 512", "decode 128", "decode 496"]
    ours, theirs = (dict(zip(header, row, strict=True)) for row in rows[1:])
    assert all(theirs[name] == "1.00" for name in header[7:]) and all(float(ours[name]) > 0 for name in header[1:4])
    assert lines[-3].startswith("builder int4: load ") and "the model reads 512" in lines[-1]


@pytest.mark.slow
def test_auto_table(run, model, text):
    lines = run(
        "auto_table.py", model, "--calibration", text, "--text", text, "--windows", 1, "--window", 64,
        "--schemes", "w4a16_g16",
    ).splitlines()  # fmt: skip
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1].split(":")[0] for row in rows[2:]] == ["w4a16_g16 everywhere", "chosen"]
    assert all(float(row[2]) > 0 for row in rows[2:])
    one, chosen = (float(row[0].split()[0]) for row in rows[2:])
    assert chosen <= one


@pytest.mark.slow
def test_kl_on_texts(run, model, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"{n * n} green bottles hanging on the wall" for n in range(200)))
    given = ("--calibration", text, "--text", text, other, "--windows", 2, "--window", 64, "--folder", tmp_path)
    first = run("kl_on_texts.py", model, "w4a16_g32_rtn", "w8a16_g32", *given).splitlines()
    rows = {cells[0]: cells for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in first)}
    coarse, fine = ([float(cell.split()[0]) for cell in rows[name][2:4]] for name in ("w4a16_g32_rtn", "w8a16_g32"))
    assert all(0 < few < many for few, many in zip(fine, coarse, strict=True))
    assert rows["pairs in the order of the first"][2:4] == ["1 of 1", "1 of 1"]
    kept = [f"coarse={tmp_path / 'w4a16_g32_rtn'}", f"fine={tmp_path / 'w8a16_g32'}"]
    again = run("kl_on_texts.py", model, *kept, *given).splitlines()
    assert [line.split("|")[2:] for line in again] == [line.split("|")[2:] for line in first]


def test_pairs_of_exports_in_the_order_of_the_first_text():
    def scores(**kl):
        return {name: SimpleNamespace(kl_mean=value) for name, value in kl.items()}

    in_order = sample("kl_on_texts.py")["in_order"]
    assert in_order(scores(a=1, b=2, c=3), scores(a=10, b=30, c=20)) == "2 of 3"


@pytest.mark.slow
def test_foretold_prices(run, model, text):
    given = ("--calibration", text, "--text", text, "--scheme", "w4a16_g16_s8", "--windows", 1, "--window", 64)
    lines = run("foretold_prices.py", model, *given).splitlines()
    rows = {line.split("|")[1].strip(): [float(cell) for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert {"lm_head", "q_proj", "down_proj"} <= rows.keys()
    for foretold, measured, *_ in rows.values():
        assert measured > 0 and 1 / 3 < foretold / measured < 3


@pytest.mark.slow
def test_kv_cache_error(run, model, text):
    lines = run("kv_cache_error.py", model, "--text", text, "--tokens", 48).splitlines()
    rows = {tuple(line.strip("| ").split(" | ")[:3]): float(line.split(" | ")[3].split()[0]) for line in lines[2:]}
    assert len(rows) == 5 * 2 * 4
    assert all(rows["both, past alone", bits, scales] > rows["both", bits, scales] for _, bits, scales in rows)
    for what in ("values", "keys, before rotation", "keys, behind rotation"):
        assert rows[what, "8", "channel"] > rows[what, "4", "channel"] + 15
        assert rows[what, "8", "channel"] >= rows[what, "8", "tensor"] - 1


@pytest.mark.slow
def test_learn_rotation(run, model, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"{n * n} green bottles hanging on the wall" for n in range(200)))
    given = ("--calibration", text, "--text", other, "-o", tmp_path / "turn.safetensors", "--windows", 2)
    out = run("learn_rotation.py", model, *given, "--steps", 20, "--rate", 0.02).splitlines()
    costs = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in out[2:]}
    assert list(costs) == ["none", "Hadamard", "orthogonal, at random", "learned, 20 steps"]
    assert costs["learned, 20 steps"] < costs["Hadamard"]
    recipe = qexport.Recipe(scheme="w4a4", rotation={"matrix": str(tmp_path / "turn.safetensors")})
    qexport.export(model, recipe, out_dir=tmp_path / "out")
    assert qexport.validate(tmp_path / "out", model, text=text, windows=1, window=64).problems == ()


def test_drafts_of_a_whole_model_are_right_and_those_of_another_are_not(model, monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLES))
    skipped = sample("skipped_layers.py")
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    written, most = skipped["write"](causal, [5, 6, 7, 8]), skipped["MOST"]
    assert skipped["right"](causal, written) == [most] * (skipped["NEW"] - most + 1)
    assert skipped["calls"]([3, 3, 1, 0, 9], 2) == (7, 3)
    with skipped["without"](causal, {1}):
        assert min(skipped["right"](causal, written)) < most
    assert skipped["cost_of"](causal, {1}) == pytest.approx(1 - (1 - skipped["cost_of"](causal, {0, 1})) / 2)


@pytest.mark.slow
def test_rotation_cost(run):
    out = run("rotation_cost.py", "--width", 48, "--out-features", 32, "--rows", 2, "--repeats", 1).splitlines()
    rows = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in out[2:]}
    assert list(rows)[:2] == ["rotation 4 x 12", "rotation 12 x 4"] and rows["integer projection"] == 1
    assert len(rows) == 7 and all(share > 0 for share in rows.values())


@pytest.mark.slow
def test_encoder(run, tmp_path):
    from transformers import BertTokenizerFast

    folder = save_encoder("bert", tmp_path / "encoder", max_position_embeddings=128)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(chr, range(97, 123)), *(f"##{chr(c)}" for c in range(97, 123))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    lines = run("encoder.py", folder, "--recipes", "w8a8_dyn", "w4a16_g32_rtn", "--repeats", 1).splitlines()
    rows = {line.split()[1]: line.split("|")[2:-1] for line in lines if line.startswith("| ")}
    assert list(rows) == ["file", "---", "float32", "w8a8_dyn", "w4a16_g32_rtn"]
    float32, eight, four = (list(map(float, (cell.rstrip("% ") for cell in rows[n]))) for n in list(rows)[2:])
    # The order of similarities suffers more from 4 bits than from 8.
    assert float32[2] == float32[4] == 1 and float32[4] > eight[4] > four[4] > 0.5 and four[2] > 0.9


@pytest.mark.slow
def test_vision(run):
    lines = run("vision.py", "--steps", 20, "--repeats", 1).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    (_, size, none, right, _, _), (_, small, nine, as_right, decibels, _) = rows
    # The stem reads one channel, which integers are too slow for.
    assert (none, nine) == ("0", "9") and int(small) < 0.35 * int(size)
    assert abs(float(right.rstrip("%")) - float(as_right.rstrip("%"))) < 3 and float(decibels.split()[0]) > 20


@pytest.mark.slow
def test_recurrent_decoders(run):
    lines = run("recurrent_decoders.py", "mamba", "--layers", 1, "--prompt", 16, "--turns", 1).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[1] for row in rows] == ["transformers", "float32", "w4a16_g32", "w8a8_dyn"]
    assert rows[0][3] == rows[0][5] == "1.00" and all(float(row[2]) > 0 for row in rows)


@pytest.mark.slow
def test_families(run):
    lines = run("families.py", "--families", "gpt2", "openai_gpt").splitlines()
    (row,) = (line for line in lines if line.startswith("| gpt2 |"))
    assert "| grouped |  | 9 | none |" in row and len(row.split("|")) == 12
    assert any(line.startswith("- `openai_gpt`: ") and "does not take a transformers cache" in line for line in lines)


@pytest.mark.slow
def test_seq2seq(run, tmp_path):
    lines = run("seq2seq.py", "--steps", 60, "--recipes", "w8a8_dyn", "--keep", tmp_path / "kept").splitlines()
    rows = [line for line in lines if line.startswith(("| float32", "| w8a8"))]
    float_row, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in rows)
    assert float_row[0] == "float32" and row[0] == "w8a8_dyn" and float(row[1]) < 0.4 * float(float_row[1])
    assert 0 < float(row[3]) < 0.05 and float(row[4].removesuffix(" %")) > 90


def test_numbers_in_words():
    in_words = sample("seq2seq.py")["in_words"]
    assert [in_words(n) for n in (0, 15, 40, 342, 1000, 90_021)] == [
        "zero", "fifteen", "forty", "three hundred forty two", "one thousand", "ninety thousand twenty one",
    ]  # fmt: skip


@pytest.mark.slow
def test_kept_codes_table(run, text, tmp_path):
    folder = save_model("llama", tmp_path / "coded", vocab_size=VOCAB, max_position_embeddings=2 * WINDOW)
    write_word_tokenizer(folder, VOCAB)

    def encode(path, shape):
        made = packers.random_codes(shape, 4, 32, symmetric=False, seed=shape[1], act_order=True)
        return packers.gptq(*made, 4), packers.dequantized(*made)

    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}
    packers.coded(folder, lambda path, shape: encode(path, shape) if "lm_head" not in path else None, said)
    (line,) = run("kept_codes_table.py", folder, "--text", text, "--windows", 1, "--window", 64).splitlines()[2:]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:5] == [
        "coded", "GPTQ, 4 bits in groups of 32, act-order", "14 w4a16_g32_asym", "14 of 14", "14 of 14"
    ]  # fmt: skip
    assert float(cells[5]) < 1e-9 and cells[8] == "14 MatMulNBits"
    out = qexport.export(folder, out_dir=tmp_path / "out").folder
    rows = run("act_order_cost.py", out, "--prompt", 16).splitlines()[2:]
    assert [row.split("|")[2].strip() for row in rows] == ["8", "10"], "q, k with v, o, gate with up; none for down"
    assert all(0 < float(row.split("|")[3].strip(" %")) < 100 for row in rows)


@pytest.mark.slow
def test_a_row_of_public_modules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SAMPLES)
    sample = runpy.run_path(str(SAMPLES / "public_modules.py"))
    name = "transformers PatchTST"  # which needs no package that is not here
    difference, linears, cosine, why = sample["row"](name, tmp_path).split("|")[2:6]
    assert float(difference) < 1e-4
    assert int(linears) > 5
    assert float(cosine) > 0.999
    assert not why.strip()


@pytest.mark.slow
def test_lines_of_recurrent_networks(tmp_path):
    sample = runpy.run_path(str(SAMPLES / "recurrent.py"))
    case = sample["gated"](torch.Generator().manual_seed(0))
    files = {line.split("|")[2].strip(): line for line in sample["table"](case, tmp_path)}
    assert list(files) == ["float32", "w8a8_dyn", "w4a16_g32", "quantize_dynamic", "quantize_dynamic, per channel"]
    assert all(float(line.split("|")[4].split(",")[1]) > 0.99 for line in files.values())


@pytest.mark.slow
def test_lines_of_speech_without_data(all_convolutions, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SAMPLES)
    lines = sample("speech_without_data.py")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(1, 16, 5), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Conv1d(16, 16, 3),
        torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool1d(4), torch.nn.Flatten(),
        torch.nn.Linear(64, 8),
    )  # fmt: skip
    case = lines["Case"]("quiet", model, lambda waves: waves[:, None])
    quiet = 0.05 * torch.randn(40, 400)
    name, *cells = lines["measured"](case, quiet, tmp_path)
    noise, norms, heard = (float(cell.removesuffix(" dB")) for cell in cells)
    assert name == "quiet" and norms > noise + 6 and norms > heard - 6


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4])
def test_training_rounds_as_the_checkpoint_it_writes(bits):
    """Forward to the formula of a checkpoint's weights; back to weights inside of the grid, and to clip values."""
    made = sample("train_few_bits.py")
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(bits)).requires_grad_()
    clip = made["closest_clip"](weight.detach(), bits).requires_grad_()
    stored = ClippedWeight("a", (6, 32), ("w", "c"), None, "", "F32", StoredGrid(max(bits, 2), 32, True, 32), bits)
    found = made["rounded"](weight, clip, bits)
    wanted = stored.formula({"w": weight.detach(), "c": clip.detach()}.__getitem__)
    torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-6, atol=0)
    found.sum().backward()
    codes, inside = found.detach() / clip.detach(), weight.detach() / clip.detach()
    half, near = 2.0 ** (bits - 1), inside.round() if bits > 2 else inside
    low, high = {0: (-0.99, 0.99), 1: (-1, 1), 2: (-0.99, 0.99)}.get(bits, (-half, half - 1))
    within = near.clamp(low, high) == near
    torch.testing.assert_close(weight.grad, within.float())
    # A wider clip moves a code out, and a weight inside of the grid towards lower codes.
    torch.testing.assert_close(clip.grad, (codes - inside * within).sum(1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_train_few_bits(run, model, tmp_path):
    out = run("train_few_bits.py", model, "-o", tmp_path / "trained", "--steps", 10, "--texts", 16, "--length", 32)
    row = out.splitlines()[-1].strip("| ").split(" | ")
    before, after, exported = map(float, row[2:5])
    assert after < before and exported == pytest.approx(after, rel=0.05)
