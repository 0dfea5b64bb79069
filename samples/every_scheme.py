"""Every preset on one model, with size, distance from the float model, and speed.

    python samples/every_scheme.py MODEL [--text FILE] [--recipes w4a16_g32 w8a8_dyn ...] [--target cpu]

KL is the mean Kullback-Leibler divergence of next-token distributions, float against quantized: 0 is the float model.
"""

import argparse

import qexport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", help="UTF-8 text to calibrate and to measure on; without it the model writes its own")
    parser.add_argument("--recipes", nargs="*", default=list(qexport.Recipe.presets()))
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    print(f"{'recipe':<16}{'MB':>8}{'KL':>9}{'top-1':>8}{'prefill':>9}{'decode':>8}   tokens/s")
    for name in args.recipes:
        recipe = qexport.Recipe.load(name).with_calibration(
            samples=args.samples, sequence_length=args.length, batch_size=8
        )
        out = f"out/every_scheme/{name}"
        made = qexport.export(
            args.model, recipe, out_dir=out, target=args.target, calibration=args.text, overwrite=True
        )
        scores = qexport.validate(out, args.model, text=args.text, windows=4, window=args.length).logits
        speed = qexport.bench(out, prompt_lengths=[args.length], decode_pasts=[args.length], repeats=3).first
        print(
            f"{name:<16}{made.manifest.bytes['model'] / 1e6:>8.1f}{scores.kl_mean:>9.4f}{scores.top1_agreement:>8.1%}"
            f"{speed.prefill[args.length]:>9.0f}{speed.decode[args.length]:>8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
