"""Quantize a model, prove it, let it write: python samples/quickstart.py MODEL [TEXT_FILE]

MODEL is a Hugging Face id, a folder or a GGUF file (`make demo` leaves one in .cache/smollm2). TEXT_FILE is text to
calibrate on; without it the model writes its own.
"""

import sys

import qexport


def main(model: str, text: str | None) -> None:
    recipe = qexport.Recipe.load("w4a16_g32").with_calibration(samples=8, sequence_length=256, batch_size=8)
    result = qexport.export(model, recipe, out_dir="out/quickstart", calibration=text, overwrite=True)
    manifest = result.manifest
    print(f"{result.folder}: {manifest.bytes['model'] / 1e6:.1f} MB, {len(manifest.linears)} linears quantized")

    report = qexport.validate(result.folder, model, windows=4, window=256)
    for sentence in report.verdict:
        print(f"  {sentence}")

    prompt = "The three primary colours are"
    print(prompt, end="", flush=True)
    qexport.generate(
        result.folder, prompt, max_new_tokens=40, on_text=lambda row, piece: print(piece, end="", flush=True)
    )
    print()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
