"""Files for CUDA on a GPU, beside the graphs they were written from: every family, every scheme, random small models.

    python samples/gpu_numerics.py [--cases 'llama/*'] [--workers 8] [--seconds 120] [--out FILE]

A row for each case: how far the file on CUDA is from its graph in PyTorch, as SQNR in dB of what the model returns; how
far the graph is from the float model, and the file. Right is a file that is no further from the float model than its
graph is, up to 3 dB. Decoders run as they are deployed, a prompt with padding and steps on a shared cache, one by one
and as a CUDA graph. With the helpers of the tests, so this runs in a checkout of the project. Every finished case is
written at once; --provider cpu rehearses without a GPU.
"""

import argparse
import copy
import json
import math
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import qexport  # noqa: F401  # isort: skip  before ONNX Runtime, whose telemetry it turns off
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import exports, random_modules  # noqa: E402
from helpers.random_decoders import BREADTH, FAMILIES, save_model  # noqa: E402
from helpers.runners import (  # noqa: E402
    block_runner,
    captured_runner,
    load_weights,
    next_feeds,
    padded,
    prompt_feeds,
    source_of,
    stepwise,
    tokens,
)
from qexport.api.stages.capturing import capture_model  # noqa: E402
from qexport.artifact.manifest import CPU, CUDA  # noqa: E402
from qexport.calibrate.encoder_inputs import encoder_batch  # noqa: E402
from qexport.capture.module import capture_module  # noqa: E402
from qexport.capture.seq2seq import capture_seq2seq  # noqa: E402
from qexport.errors import QExportError  # noqa: E402
from qexport.models.source import open_model  # noqa: E402
from qexport.quant.metrics import sqnr_db  # noqa: E402
from qexport.recipe.recipe import CalibrationSpec, Override, Recipe  # noqa: E402
from qexport.recipe.registry import section  # noqa: E402
from qexport.runtime.decoder import open_decoder  # noqa: E402
from qexport.runtime.session import open_session, optimized_graph  # noqa: E402
from qexport.validation.running import run_session  # noqa: E402

STEPS = 5
MASK = padded([9, 4, 6], "left")
SCHEMES = (
    "w4a16_g16_asym", "w4a16_g32", "w4a16_g32_asym", "w4a16_g64", "w4a16_g128", "w4a16_pc", "w8a16_g32", "w8a16_g128",
    "w2a16_g32", "w2a16_g64", "w3a16_g32", "w8a8_dyn", "w8a8_static", "w4a8", "w4a8_g32", "w4a8_g32_static", "nf4",
    "fp4",
)  # fmt: skip
METHODS = {
    "lorc": {"scheme": "w4a16_g32", "lorc": section("lorc", rank=4)},
    "kv8": {"scheme": "w4a16_g32", "kv_cache": {"bits": 8}},
    "kv4": {"scheme": "w4a16_g32", "kv_cache": {"bits": 4}},
    "tied": {"scheme": "w4a16_g32", "embedding": "tied"},
    "embedding4": {"scheme": "w4a16_g32", "embedding": "w4a16_g32"},
    "rotation": {"scheme": "w8a8_dyn", "rotation": {}},
    "float": {"scheme": "w8a8_dyn", "lm_head": "float", "overrides": (Override(match="*", scheme="float"),)},
}  # fmt: skip
NO_BFLOAT16 = ("w8a8_dyn", "w8a8_static", "w4a8", "w4a8_g32", "w4a8_g32_static", "rotation", "w4a16_pc")
# Sizes that fast kernels ask for: XQA takes heads of 64 in groups, fpA_intB multiples of 64 and 128.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def all_cases() -> list[str]:
    """kind/family/scheme/dtype of every case, the most telling first."""
    cases = [f"decoder/{family}/{scheme}/{dtype}" for family in ("wide", "llama") for scheme in (*SCHEMES, *METHODS)
             for dtype in ("float16", *(() if scheme in NO_BFLOAT16 else ("bfloat16",)))]  # fmt: skip
    cases += [f"decoder/{family}/{scheme}/float16" for scheme in ("w4a16_g32", "w8a8_dyn")
              for family in (*FAMILIES, *BREADTH) if family != "llama"]  # fmt: skip
    for kind, families in (("module", random_modules.MODULES), ("encoder", random_modules.ENCODERS),
                           ("seq2seq", random_modules.SEQ2SEQ)):  # fmt: skip
        cases += [f"{kind}/{family}/{scheme}/float16" for scheme in ("w4a16_g32", "w8a8_static") for family in families]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["*"], help="shell patterns of kind/family/scheme/dtype")
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no case is begun after so many")
    parser.add_argument("--out", type=Path, default=Path("gpu_numerics.jsonl"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    provider = CPU if given.provider == "cpu" else CUDA
    if given.worker:
        for line in sys.stdin:
            print(json.dumps(measured(line.strip(), provider)), flush=True)
        return
    shown = [case for case in all_cases() if provider == CUDA or not case.endswith("bfloat16")]
    cases = [case for case in shown if any(fnmatchcase(case, pattern) for pattern in given.cases)]
    rows = run_all(cases, given)
    print(table(rows, len(cases)))


def run_all(cases: list[str], given: argparse.Namespace) -> list[dict]:
    """The rows of all cases, over processes that are begun again when one dies."""
    command = [sys.executable, __file__, "--worker", "--provider", given.provider]
    waiting, rows, busy, start = list(reversed(cases)), [], {}, time.monotonic()
    with given.out.open("w") as file:
        while waiting or busy:
            while waiting and len(busy) < given.workers and time.monotonic() - start < given.seconds:
                busy[subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                      stderr=subprocess.DEVNULL)] = None  # fmt: skip
            if time.monotonic() - start >= given.seconds:
                waiting = []
            for process in list(busy):
                if busy[process] is None and waiting:
                    busy[process] = waiting.pop(), time.monotonic()
                    process.stdin.write(busy[process][0] + "\n")
                    process.stdin.flush()
                elif busy[process] is None:
                    process.stdin.close()
                    process.wait()
                    del busy[process]
            ready = selectors.DefaultSelector()
            for process in busy:
                ready.register(process.stdout, selectors.EVENT_READ, process)
            for key, _ in ready.select(timeout=1):
                process = key.data
                line = process.stdout.readline()
                case = busy[process][0]
                if line:
                    rows.append(json.loads(line))
                    busy[process] = None
                else:
                    rows.append({"case": case, "failed": f"the process died with {process.wait()}"})
                    del busy[process]
                print(json.dumps(rows[-1]), file=file, flush=True)
            for process in list(busy):
                if busy[process] and time.monotonic() - busy[process][1] > 90:
                    process.kill()
    return rows


def measured(case: str, provider: str) -> dict:
    """A row; what fails is a row as well."""
    kind, family, scheme, dtype = case.split("/")
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="qexport-") as place:
            folder = Path(place)
            run = {"decoder": decoder, "encoder": encoder, "module": module, "seq2seq": seq2seq}[kind]
            found = run(family, recipe_of(scheme), dtype, folder, provider)
    except Exception as error:  # of one case; the others are worth knowing
        kind = "" if isinstance(error, QExportError) else f"{type(error).__name__}: "
        found = {"failed": f"{kind}{' '.join(str(error).split())}"[-600:]}
    return {"case": case, "seconds": round(time.monotonic() - start, 1), **found}


def recipe_of(name: str) -> Recipe:
    calibration = CalibrationSpec(source="random", samples=4, sequence_length=16)
    given = {"lm_head": METHODS.get(name, {}).get("scheme", name), **METHODS.get(name, {"scheme": name})}
    return Recipe(weights={"method": "rtn"}, calibration=calibration, **given)


def decoder(family: str, recipe: Recipe, dtype: str, folder: Path, provider: str) -> dict:
    name, changes = ("llama", WIDE) if family == "wide" else (family, {})
    captured = capture_model(save_model(name, folder / "model", **changes))
    exported = exports.export(copy.deepcopy(captured), recipe, "cuda", folder / "out", dtype=dtype)
    reference = captured_runner(load_weights(captured))
    ids, wide = tokens(*MASK.shape), getattr(torch, dtype)
    lowered = exported.lowered
    runs = {"float": reference, "graph": block_runner(exported.blocks, lowered.inputs, lowered.outputs)}
    feeds = {"float": prompt_feeds(captured, ids, MASK)}
    empty = {p.name: p.empty(len(ids)) for p in lowered.inputs if p.name.startswith("past")}  # of codes, some
    feeds["graph"] = feeds["float"] | {n: v.to(wide) if v.is_floating_point() else v for n, v in empty.items()}
    kept = {key: [] for key in runs}
    forced = []
    for step in range(1 + STEPS):
        results = {key: run(feeds[key]) for key, run in runs.items()}
        real = MASK.bool() if step == 0 else torch.ones(len(MASK), 1, dtype=torch.bool)
        for key, result in results.items():
            kept[key].append(result["logits"][real].float())
        chosen = results["float"]["logits"][:, -1].argmax(-1)
        forced.append(chosen)
        feeds = {key: next_feeds(feeds[key], results[key], chosen) for key in runs}
    want = {key: torch.cat(rows) for key, rows in kept.items()}
    found = {"graph_to_float": sqnr_db(want["float"], want["graph"])}
    for title, records in (("run", False), ("recorded", True))[: 2 if provider == CUDA else 1]:
        try:
            session = open_decoder(exported.folder, provider=provider, max_length=32, threads=1, records=records)
            rows = [torch.from_numpy(session.run(ids.numpy(), MASK.numpy()).copy())[MASK.bool()]]
            rows += [torch.from_numpy(session.run(t[:, None].numpy()).copy())[:, 0] for t in forced[:-1]]
        except QExportError as error:
            if title == "run":
                raise
            found[title] = {"failed": " ".join(str(error).split())[-300:]}
            continue
        found[title] = compared(want, torch.cat(rows).float())
    return found | placed(exported.folder, provider) | {"attention": exported.manifest.settings["attention"]}


def compared(want: dict[str, torch.Tensor], got: torch.Tensor) -> dict:
    worst = (got - want["graph"]).abs().max() / want["graph"].abs().max()
    top = (got.argmax(-1) == want["graph"].argmax(-1)).float().mean()
    return {"to_graph": sqnr_db(want["graph"], got), "to_float": sqnr_db(want["float"], got), "worst": float(worst),
            "top1": float(top)}  # fmt: skip


def placed(folder: Path, provider: str) -> dict:
    if provider == CPU:
        return {}
    graph = optimized_graph(folder, provider=provider)
    away = Counter(op for _, op, where in graph.placement if where == "CPUExecutionProvider")
    return {"cpu": dict(away), "memcpy": sum(n for op, n in graph.op_counts().items() if op.startswith("Memcpy"))}


def encoder(family: str, recipe: Recipe, dtype: str, folder: Path, provider: str) -> dict:
    random_modules.save_encoder(family, folder / "model")
    captured = capture_model(folder / "model")
    feeds = encoder_batch(captured, tokens(*MASK.shape), MASK)
    return one_call(captured, feeds, recipe, folder / "out", provider)


def module(family: str, recipe: Recipe, dtype: str, folder: Path, provider: str) -> dict:
    feeds = random_modules.example_inputs(family)
    captured = capture_module(random_modules.make_module(family), feeds, random_modules.axes(family))
    return one_call(captured, feeds, recipe, folder / "out", provider, calibration=[feeds])


def one_call(captured, feeds: dict, recipe: Recipe, out: Path, provider: str, **options) -> dict:
    exported = exports.export(copy.deepcopy(captured), recipe, "cuda", out, **options)
    want = {"float": captured_runner(load_weights(captured))(feeds)}
    half = {name: value.to(exported.dtype) if value.is_floating_point() else value for name, value in feeds.items()}
    lowered = exported.lowered
    want["graph"] = block_runner(exported.blocks, lowered.inputs, lowered.outputs)(half)
    session = open_session(exported.folder, exported.manifest, threads=1, provider=provider)
    got = run_session(session, half, [value.name for value in session.get_outputs()])
    mask = feeds.get("attention_mask") if captured.kind == "encoder" else None

    def rows(value: torch.Tensor) -> torch.Tensor:
        value = value.float()
        return value[mask.bool()] if mask is not None and value.shape[:2] == mask.shape else value

    worst = [compared({key: rows(values[name]) for key, values in want.items()}, rows(got[name])) for name in got
             if got[name].is_floating_point()]  # fmt: skip
    found = min(worst, key=lambda row: row["to_graph"])
    floor = min(sqnr_db(rows(want["float"][name]), rows(want["graph"][name])) for name in got)
    return {"graph_to_float": floor, "run": found} | placed(exported.folder, provider)


def seq2seq(family: str, recipe: Recipe, dtype: str, folder: Path, provider: str) -> dict:
    parts = capture_seq2seq(open_model(random_modules.save_seq2seq(family, folder / "model")))
    captured = {"encoder": parts.encoder, "decoder": parts.decoder}
    mask = padded([7, 2, 5], "right")
    source, text = source_of(parts.encoder, mask), tokens(len(mask), 3 + STEPS, 5)
    runs = (captured_runner(load_weights(copy.deepcopy(c))) for c in captured.values())
    _, calls = stepwise(*runs, parts.decoder, source, text)
    feeds = {"encoder": [source], "decoder": [fed for fed, _ in calls]}
    rows = [one_call(copy.deepcopy(whole), fed, recipe, folder / f"{part}{i}", provider, calibration=feeds[part][:1])
            for part, whole in captured.items() for i, fed in enumerate(feeds[part][:2])]  # fmt: skip
    return min(rows, key=lambda row: row["run"]["to_graph"])


def is_wrong(row: dict) -> bool:
    """Whether a file is further from the float model than its graph is."""
    sides = [row[key] for key in ("run", "recorded") if key in row]
    return any("failed" in s or not s["to_float"] > row["graph_to_float"] - 3 for s in sides)


def table(rows: list[dict], cases: int) -> str:
    failed = [row for row in rows if "failed" in row]
    wrong = [row for row in rows if "failed" not in row and is_wrong(row)]
    away = [row for row in rows if row.get("memcpy")]
    lines = [f"{len(rows)} of {cases} cases: {len(failed)} failed, {len(wrong)} wrong, {len(away)} with copies"]
    lines += [f"FAILED {row['case']}: {row['failed'][-200:]}" for row in failed]
    lines += [f"WRONG {json.dumps(row)[:600]}" for row in wrong]
    lines += [f"COPIES {row['case']} {row['memcpy']} {row['cpu']}" for row in away]
    return "\n".join(lines)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    main()
