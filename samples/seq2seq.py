"""Quantize an encoder-decoder, and see whether it still gets its answers right.

The model is a small T5 that is trained here, for some minutes, to write numbers in words; one of your own takes the
same calls: `qexport.export(MODEL, ...)`.

python samples/seq2seq.py
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, logging

import qexport

SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SPECIAL = ["<pad>", "</s>", "<unk>"]
WORDS = [*SPECIAL, *map(str, range(10)), *SMALL, *TENS, "hundred", "thousand"]
RECIPES = ["w8a8_dyn", "w8a8_static", "w4a16_g32", "w4a16_g32_rtn"]


def in_words(number: int) -> str:
    if number < 20:
        return SMALL[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f" {SMALL[number % 10]}" if number % 10 else "")
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = number % unit
    return f"{in_words(number // unit)} {name}" + (f" {in_words(rest)}" if rest else "")


def digits(number: int) -> str:
    return " ".join(str(number))


def drawn(count: int, chance: random.Random) -> list[int]:
    """Numbers of one to six digits, as many of each length."""
    return [chance.randrange(10 ** chance.randint(1, 6)) for _ in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def trained(folder: Path, steps: int, batch: int = 64) -> None:
    """Train a model to write numbers in words, and save it with its tokenizer."""
    torch.manual_seed(0)
    chance, words = random.Random(0), tokenizer()
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(WORDS), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        numbers = [n for n in drawn(batch, chance) if n % 7]  # multiples of 7 are kept for the test
        source = words([digits(n) for n in numbers], padding=True, return_tensors="pt")
        labels = words([in_words(n) for n in numbers], padding=True, return_tensors="pt").input_ids
        loss = model(source.input_ids, source.attention_mask, labels=labels.masked_fill(labels == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1} of {steps}, loss {loss.item():.4f}", flush=True)
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)


def written_by_float(folder: Path, texts: list[str]) -> list[str]:
    words, model = tokenizer(), T5ForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        made = model.generate(**words(texts, padding=True, return_tensors="pt"), max_new_tokens=24)
    return words.batch_decode(made, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=900, help="of training")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--keep", type=Path, help="folder to keep the model and its exports in")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        run(arguments.keep or Path(temporary), arguments)


def run(place: Path, arguments: argparse.Namespace) -> None:
    model = place / "model"
    if not model.exists():
        start = time.perf_counter()
        trained(model, arguments.steps)
        print(f"trained in {time.perf_counter() - start:.0f} s")
    chance = random.Random(1)
    numbers = [n for n in drawn(2000, chance) if n % 7 == 0 and n >= 10][:200]
    texts, answers = [digits(n) for n in numbers], [in_words(n) for n in numbers]
    calibration = [digits(n) for n in drawn(64, chance) if n % 7]
    right = sum(map(str.__eq__, written_by_float(model, texts), answers))
    print(f"\n| file | MB | right, of {len(texts)} | KL from float | same token likeliest |")
    print("| --- | --- | --- | --- | --- |")
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(f"| float32 | {size / 1e6:.2f} | {right} | 0 | 100 % |")
    for recipe in arguments.recipes:
        out = place / recipe
        made = qexport.export(model, recipe, out_dir=out, calibration=calibration, overwrite=True)
        # 24 tokens are written about each number; what follows the end of an answer is the model's own, too.
        report = qexport.validate(out, model, inputs=texts[:64], greedy=12)
        assert not report.problems, report.problems
        right = sum(map(str.__eq__, qexport.generate(out, texts, max_new_tokens=24), answers))
        size = made.manifest.bytes["model"]
        scores = report.logits
        print(
            f"| {recipe} | {size / 1e6:.2f} | {right} | {scores.kl_mean:.2g} | {100 * scores.top1_agreement:.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
