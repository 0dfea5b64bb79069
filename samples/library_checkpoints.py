"""A model quantized by the library that has a format, and what the library computes with it, for `kept_codes_table.py`.

    PYTHONPATH=tests ENV/bin/python samples/library_checkpoints.py MODEL OUT --text FILE [NAME ...]

It runs in an environment of the library (`pip install` what `tests/helpers/library_checkpoints.py` names, with this
project's PyTorch and transformers beside it), and does without qexport. OUT/NAME is the checkpoint, and
OUT/NAME.safetensors holds the token ids of the first windows of the text, the logits of the float model with the
weights that the library dequantizes ("weights"), and those of the library's own run in float32 ("run", and "as loaded"
where a switch makes them differ). Names whose library is missing are told and skipped.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import library_checkpoints as library

Logits = dict[str, Tensor]


def by_transformers(model: Path, out: Path, ids: Tensor) -> Logits:
    """Its own classes of linears, as transformers puts them into the model.

    Raises:
        ValueError: it leaves some weights at random.
    """
    options = {"dtype": torch.float32, "device_map": "cpu", "output_loading_info": True}
    whole, said = AutoModelForCausalLM.from_pretrained(out, **options)
    if missing := said["missing_keys"]:
        raise ValueError(f"transformers finds {len(missing)} of its weights nowhere, {min(missing)} first")
    return {"run": logits(whole.eval(), ids)}


def by_hqq(model: Path, out: Path, ids: Tensor) -> Logits:
    """Its own linears in the float model: transformers 5 reads no weights that it saved."""
    from hqq.core.quantize import HQQLinear

    whole, state = _loaded(model), load_file(out / "model.safetensors")
    for name in [key.removesuffix(".W_q") for key in state if key.endswith(".W_q")]:
        linear = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
        linear.load_state_dict({k.removeprefix(f"{name}."): t for k, t in state.items() if k.startswith(f"{name}.")})
        whole.set_submodule(name, linear)
    return {"run": logits(whole, ids)}


def by_bitsandbytes(model: Path, out: Path, ids: Tensor) -> Logits:
    """In evaluation its linears multiply in bfloat16 on a CPU with AVX512-BF16, whatever the compute dtype says; in
    training they dequantize, and multiply in the compute dtype. This model drops nothing out."""
    whole = _loaded(out)
    return {"run": logits(whole.train(), ids), "as loaded": logits(whole.eval(), ids)}


def by_auto_round(model: Path, out: Path, ids: Tensor) -> Logits:
    """As gptqmodel: loaded in float16, and moved to float32 then."""
    whole = _loaded(out)
    return {"as loaded": logits(whole, ids), "run": logits(whole.float(), ids)}


def by_gptqmodel(model: Path, out: Path, ids: Tensor) -> Logits:
    """Its linear for any CPU is loaded in float16 or bfloat16, and computes in the dtype of its scales and input."""
    from gptqmodel import BACKEND, GPTQModel

    whole = GPTQModel.load(str(out), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    return {"as loaded": logits(whole, ids), "run": logits(whole.float(), ids)}


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
Run = Callable[[Path, Path, Tensor], Logits]  # of the float model, the checkpoint, and token ids
ROWS: dict[str, tuple[str, Callable[[Path, Path], library.Made], Run]] = {
    "gptq_4": ("gptqmodel", partial(library.gptqmodel, size=64), by_gptqmodel),
    "gptq_act_order": (
        "gptqmodel", partial(library.gptqmodel, size=64, desc_act=True, act_group_aware=False, sym=False), by_gptqmodel,
    ),
    "gptq_8": ("gptqmodel", partial(library.gptqmodel, bits=8, size=64, format="gptq_v2"), by_gptqmodel),
    "bnb_nf4": ("bitsandbytes", partial(library.bitsandbytes, **NF4), by_bitsandbytes),
    "bnb_nf4_double": (
        "bitsandbytes", partial(library.bitsandbytes, **NF4, bnb_4bit_use_double_quant=True), by_bitsandbytes,
    ),
    "bnb_fp4": (
        "bitsandbytes", partial(library.bitsandbytes, **NF4 | {"bnb_4bit_quant_type": "fp4"}), by_bitsandbytes,
    ),
    "bnb_int8": ("bitsandbytes", partial(library.bitsandbytes, load_in_8bit=True), by_transformers),
    "auto_round_4": ("auto-round", library.auto_round, by_auto_round),
    "llm_compressor_w4a16": ("llmcompressor", partial(library.llm_compressor, static=False), by_transformers),
    "llm_compressor_w8a8": ("llmcompressor", partial(library.llm_compressor, static=True), by_transformers),
    "hqq_4": ("hqq", library.hqq, by_hqq),
    "hqq_2": ("hqq", partial(library.hqq, bits=2, size=16), by_hqq),
    **{
        f"torchao_{kind}": ("torchao", partial(library.torchao, kind=kind), by_transformers)
        for kind in ("int8", "int8_dyn", "int4", "float8")
    },
    **{
        f"torchao_{kind}": ("torchao", partial(library.torchao_parts, kind=kind), by_transformers)
        for kind in ("mxfp4", "mxfp8", "nvfp4")
    },
    **{
        f"quark_{scheme}": ("amd-quark", partial(library.quark, scheme=scheme), by_transformers)
        for scheme in ("int4_wo_32", "uint4_wo_64", "int8", "fp8", "mxfp4")
    },
    **{
        f"compressed_{form.partition('-')[0]}_{preset.lower()}": (
            "compressed-tensors", partial(library.compressed_tensors, preset=preset, form=form), by_transformers,
        )
        for preset, form in (
            ("W8A8", "int-quantized"), ("NVFP4A16", "nvfp4-pack-quantized"), ("MXFP4A16", "mxfp4-pack-quantized"),
        )
    },
}  # fmt: skip
SAID = ("torch", "transformers")  # whose versions are told beside the library's


def _loaded(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(input_ids=window[None]).logits[0].float() for window in ids])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help=", ".join(ROWS))
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, default=128, help="tokens in a window")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    tokens = AutoTokenizer.from_pretrained(given.model)(given.text.read_text()[:100_000]).input_ids
    ids = torch.tensor(tokens[: given.windows * given.window]).view(given.windows, -1)
    for name in given.names or ROWS:
        package, make, run = ROWS[name]
        try:
            said = {"library": f"{package} {version(package)}"} | {other: version(other) for other in SAID}
        except PackageNotFoundError:
            print(f"{name}: skipped, {package} is not installed", flush=True)
            continue
        try:
            made = make(given.model, given.out / name)
        except Exception as error:  # of the library, whose kinds are its own
            print(f"{name}: skipped, {package} does not make it: {_first_line(error)}", flush=True)
            continue
        found, why = _ran(run, given.model, given.out / name, ids)
        found["weights"] = logits(with_weights(given.model, made), ids)
        save_file({"ids": ids, **found}, given.out / f"{name}.safetensors", metadata=said | {"why": why})
        print(f"{name}: {json.dumps(said)} {why}", flush=True)


def _ran(run: Run, model: Path, folder: Path, ids: Tensor) -> tuple[Logits, str]:
    """What a library's own run makes, and why it makes nothing."""
    try:
        return run(model, folder, ids), ""
    except Exception as error:  # of the library, whose kinds are its own
        return {}, _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def with_weights(folder: Path, made: Mapping[str, Tensor]) -> Any:
    """The float model with other weights of its linears."""
    model = _loaded(folder)
    for name, weight in made.items():
        linear = model.get_submodule(name)
        linear.weight = nn.Parameter(weight.reshape(linear.weight.shape).contiguous(), requires_grad=False)
    return model


if __name__ == "__main__":
    main()
