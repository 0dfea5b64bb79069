"""Train weights of 1 to 4 bits, or ternary ones, through their rounding (ParetoQ, arXiv 2502.02631), and export them.

    python samples/train_few_bits.py MODEL -o FOLDER [--bits 2] [--steps 100] [--text FILE]

MODEL is a Hugging Face id or a folder. Its linears, but for the output projection, round their weights whenever they
run, to odd multiples of a quarter of the row's clip value at 2 bits (SEQ), to signs at 1 and to codes around zero at 0
(ternary), 3 and 4 (LSQ). Weights and clip values are trained through that rounding by the KL to the float model, on
texts that the model writes itself or on those of FILE; every eighth is kept apart. The step with the least KL there
is kept. FOLDER/checkpoint then is a checkpoint as ParetoQ's code writes it, and FOLDER/export what
`qexport export FOLDER/checkpoint -r as_stored` makes of it: the codes that were trained, not rounded again. Printed is
the KL before and after training, of texts that were kept apart, in PyTorch and of the exported file.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import qexport
from qexport.api.stages.capturing import capture_model
from qexport.quant.learned_codes import round_through
from qexport.quant.straight_through import Descent, through
from qexport.validation.logits import compare_logits, deployed_logits
from qexport.validation.reference import FloatOutputs, decoder_feeds

CLIP = 1 - 1e-2  # of the largest magnitude that stays inside, as in ParetoQ's code
SQUARES, HELD = 0.99, 8


def rounded(weight: Tensor, clip: Tensor, bits: int) -> Tensor:
    """What a linear multiplies with; gradients go through the rounding to weights inside of the grid, and to clips.

    Args:
        weight: [N, K]; clip: [N, 1]; bits: 0 for ternary.
    """
    inside = weight / clip
    if bits == 1:
        return through(inside.clamp(-1, 1), inside.detach().sign()) * clip
    if bits in (0, 2):
        levels, shift = {0: (1.5, 0.0), 2: (2.0, 0.5)}[bits]
        return (round_through(inside.clamp(-CLIP, CLIP) * levels - shift) + shift) / levels * clip
    return round_through(inside).clamp(-(1 << bits - 1), (1 << bits - 1) - 1) * clip


def closest_clip(weight: Tensor, bits: int) -> Tensor:
    """The clip value of every row [N, 1] with the least squared error of its weights [N, K]."""
    if bits == 1:
        return weight.abs().mean(1, keepdim=True)
    widest = weight.abs().amax(1, keepdim=True) / (1 << bits - 1 if bits > 2 else 1)
    clips = [widest * share for share in torch.linspace(0.1, 1, 37).tolist()]
    errors = torch.stack([(rounded(weight, clip, bits) - weight).square().sum(1) for clip in clips])
    return torch.stack(clips)[errors.argmin(0), torch.arange(len(weight))]


class Rounds(nn.Module):
    """The rounding of a weight, with the clip values of its rows."""

    def __init__(self, weight: Tensor, bits: int):
        super().__init__()
        self.bits, self.start = bits, closest_clip(weight, bits)
        self.way = nn.Parameter(torch.zeros_like(self.start))  # of the logarithm

    @property
    def clip(self) -> Tensor:
        return self.start * self.way.exp()

    def forward(self, weight: Tensor) -> Tensor:
        # Once more on the way back, so that what happens on the way there need not be kept for all weights at once.
        return checkpoint(rounded, weight, self.clip, self.bits, use_reentrant=False)


@dataclass(frozen=True)
class Wanted:
    """What the float model says: what its output projection reads of texts [texts, tokens, features]."""

    hidden: Tensor
    head: nn.Module

    def kl(self, texts: Sequence[int], logits: Tensor) -> Tensor:
        """The mean KL of a token of some texts."""
        with torch.no_grad():
            wanted = self.head(self.hidden[list(texts)]).log_softmax(-1)
        return (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", "-o", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=2, choices=range(5), help="0 for ternary")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2, help="texts of a step")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--rate", type=float, default=0.003, help="first step of weights, in clip values")
    parser.add_argument("--clip-rate", type=float, default=0.002, help="first step of clip values, as a share")
    parser.add_argument("--text", type=Path, help="UTF-8 text instead of what the model writes")
    given = parser.parse_args()

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    ids = texts_of(model, given)
    wanted = heard(model, ids)
    held = list(range(0, len(ids), HELD))
    trained = [text for text in range(len(ids)) if text not in held]
    rounding = round_linears(model, given.bits)
    before = kl(model, wanted, ids, held)
    print(f"rounded to nearest: KL {before:.4f}", flush=True)
    after, at = train(model, rounding, wanted, ids, trained, held, given)
    save(model, rounding, given.out / "checkpoint", given)
    del model, rounding, wanted
    result = qexport.export(given.out / "checkpoint", "as_stored", out_dir=given.out / "export")
    exported, size = deployed_kl(given.model, result, ids[held]), result.manifest.bytes["model"] / 1e6
    print("| bits | step | KL before | after | exported | MB |\n| --- | --- | --- | --- | --- | --- |")
    print(
        f"| {given.bits or 'ternary'} | {at} of {given.steps} | {before:.3f} | {after:.3f} | {exported:.3f} |"
        f" {size:.1f} |"
    )


def texts_of(model: nn.Module, given: argparse.Namespace) -> Tensor:
    """Token ids [texts, tokens]: the first of a file, or what the model writes behind one drawn token."""
    if given.text is not None:
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        found = tokenizer(given.text.read_text("utf-8"), return_tensors="pt").input_ids[0]
        return found[: given.texts * given.length].view(given.texts, given.length)
    first = torch.randint(model.config.vocab_size, (given.texts, 1))
    options = dict(do_sample=True, top_k=0, max_new_tokens=given.length - 1, min_new_tokens=given.length - 1)
    return model.generate(first, attention_mask=torch.ones_like(first), pad_token_id=0, **options)


@torch.no_grad()
def heard(model: nn.Module, ids: Tensor) -> Wanted:
    hidden = [model.base_model(input_ids=text[None]).last_hidden_state for text in ids]
    return Wanted(torch.cat(hidden), model.get_output_embeddings())


def round_linears(model: nn.Module, bits: int) -> dict[str, Rounds]:
    """Let all linears but the output projection round their weights; by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            found[name] = Rounds(module.weight.detach(), bits)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, rounds in found.items():
        parametrize.register_parametrization(model.get_submodule(name), "weight", rounds)
        latent(model, name).requires_grad_(True)
    return found


def latent(model: nn.Module, name: str) -> nn.Parameter:
    """The weight that is trained, of a linear."""
    return model.get_submodule(name).parametrizations.weight.original


@torch.no_grad()
def kl(model: nn.Module, wanted: Wanted, ids: Tensor, texts: Sequence[int]) -> float:
    return sum(float(wanted.kl([text], model(input_ids=ids[[text]]).logits)) for text in texts) / len(texts)


def train(
    model: nn.Module, rounding: dict[str, Rounds], wanted: Wanted, ids: Tensor, trained: Sequence[int],
    held: Sequence[int], given: argparse.Namespace,
) -> tuple[float, int]:  # fmt: skip
    """Train in place; returns the KL of texts that were kept apart and the step that it is of, whose state is kept."""
    units = {name: float(rounds.start.mean()) for name, rounds in rounding.items()}
    moved = {f"{n}.weight": (latent(model, n), Descent(latent(model, n).data, u, SQUARES)) for n, u in units.items()}
    moved |= {f"{n}.way": (r.way, Descent(r.way.data, 1.0, SQUARES)) for n, r in rounding.items()}
    least, at, kept = kl(model, wanted, ids, held), 0, given.out / "best.safetensors"
    given.out.mkdir(parents=True)
    save_file({name: tensor.data for name, (tensor, _) in moved.items()}, kept)
    for step in range(given.steps):
        texts = [trained[(step * given.batch + place) % len(trained)] for place in range(given.batch)]
        loss = wanted.kl(texts, model(input_ids=ids[texts]).logits)
        loss.backward()
        for name, (tensor, descent) in moved.items():
            rate = given.rate if name.endswith("weight") else given.clip_rate
            descent.update(tensor.grad, rate * (1 - step / given.steps))
            tensor.grad = None
        if (step + 1) % max(given.steps // 5, 1) == 0:
            now = kl(model, wanted, ids, held)
            print(f"step {step + 1}: KL {now:.4f}, {loss.item():.4f} on what it was trained on", flush=True)
            if now < least:
                least, at = now, step + 1
                save_file({name: tensor.data for name, (tensor, _) in moved.items()}, kept)
    for name, best in load_file(kept).items():
        moved[name][0].data.copy_(best)
    kept.unlink()
    return least, at


def save(model: nn.Module, rounding: dict[str, Rounds], folder: Path, given: argparse.Namespace) -> None:
    """A checkpoint as ParetoQ's code writes it: latent weights, and clip values beside them."""
    for name in rounding:
        parametrize.remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(given.model).save_pretrained(folder)
    clips = {f"{name}.weight_clip_val": rounds.clip.detach().contiguous() for name, rounds in rounding.items()}
    place = folder / "model.safetensors"
    save_file(load_file(place) | clips, place, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"w_bits": given.bits}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def deployed_kl(model: str, result: qexport.ExportResult, ids: Tensor) -> float:
    """The mean KL of a token of an exported file to the float model, on texts [texts, tokens]."""
    captured = capture_model(model)
    reference = FloatOutputs(captured, decoder_feeds(captured, ids), ("logits",))
    try:
        return compare_logits(reference, ids, deployed_logits(result.folder, result.manifest, ids.shape[1])).kl_mean
    finally:
        reference.close()


if __name__ == "__main__":
    main()
