"""Programs in JavaScript, C++ and C# write what Python writes, and files lie where transformers.js looks for them."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import qexport
from helpers.random_decoders import save_model
from helpers.tokenizer_files import CHAT, save_tokenizer
from qexport.artifact import manifest as manifests
from qexport.errors import InputError
from qexport.runtime.session import session_options
from qexport.runtime.transformers_js import dtype_of

PAGE = (Path(__file__).parents[2] / "docs" / "deploying.md").read_text("utf-8")
PACKAGE = "@huggingface/transformers@4.3.2"
PROMPT = "The moon"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("javascript")
    model = save_tokenizer(save_model("llama", place / "model", vocab_size=400), adds_bos=True, chat=CHAT)
    return qexport.export(model, "w4a16_g32_rtn", out_dir=place / "out").folder


def test_files_lie_where_they_are_looked_for(run, folder, tmp_path):
    out = tmp_path / "web"
    code, said, _ = run("layout", folder, "-o", out)
    assert code == 0 and 'dtype: "q4"' in said and "session.qdq_matmulnbits_accuracy_level" in said
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files >= {"onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "config.json", "tokenizer.json"}
    told = json.loads((out / "config.json").read_text())
    assert told["transformers.js_config"] == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}}
    assert "manifest.json" not in files and sorted(path.name for path in tmp_path.iterdir()) == ["web"]

    manifest = manifests.load(folder)
    results = []
    for path in (folder / "model.onnx", out / "onnx" / "model_q4.onnx"):
        session = onnxruntime.InferenceSession(path, session_options(manifest), providers=[manifest.provider])
        # What transformers.js begins with: an empty cache by the names of its dimensions.
        names = {"batch_size": 1}
        feeds = {
            value.name: torch.zeros([names.get(n, 0) if isinstance(n, str) else n for n in value.shape]).numpy()
            for value in session.get_inputs() if value.name.startswith("past_key_values")
        }  # fmt: skip
        ids = torch.tensor([[1, 5, 9]])
        results.append(session.run(["logits"], feeds | {
            "input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy(),
        })[0])  # fmt: skip
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize(("schemes", "dtype"), [
    ({"w4a16_g32": 10, "w8a16_g32": 9}, "q4"), ({"w8a8_dyn": 1}, "q8"), ({"w2a16_g64": 1}, "q2"), ({}, "fp32"),
])  # fmt: skip
def test_a_type_is_that_of_most_weights(folder, schemes, dtype):
    manifest = manifests.load(folder)
    linears = [manifest.linears[0].model_copy(update={"scheme": s, "bytes": n}) for s, n in schemes.items()]
    assert dtype_of(manifest.model_copy(update={"linears": tuple(linears)})) == dtype


def test_what_transformers_js_cannot_load_is_refused(folder, export_folder, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there: exists already"):
        qexport.layout(folder, tmp_path / "there")
    with pytest.raises(InputError, match="cache in codes"):
        qexport.layout(export_folder("llama", "w4a16_g32_kv8", calibration="random"), tmp_path / "out")
    recipe, example = qexport.Recipe(scheme="w8a8_dyn"), (torch.ones(2, 8),)
    module = qexport.export(nn.Linear(8, 8), recipe, out_dir=tmp_path / "module", example_inputs=example)
    with pytest.raises(InputError, match="is a module.*onnxruntime-node"):
        qexport.layout(module.folder, tmp_path / "out")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "model.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="not as the export wrote it"):
        qexport.layout(copy, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "module", "there"]


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """node(script) -> what it prints, in a folder with transformers.js and the runtime that comes with it."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    place = tmp_path_factory.mktemp("node")
    (place / "package.json").write_text("{}")
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", PACKAGE]  # scripts fetch CUDA's part
    subprocess.run(command, cwd=place, check=True, capture_output=True)

    def run_script(script: str) -> str:
        (place / "script.mjs").write_text(script)
        done = subprocess.run(["node", "script.mjs"], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_script


def block(start: str) -> str:
    return next(found for found in re.findall(r"```js\n(.*?)```", PAGE, re.DOTALL) if found.startswith(start))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_loop_of_the_documentation_in_node(node, export_folder, family):
    out, names = export_folder(family, "w8a16"), {}
    exec(next(iter(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))), names)
    said = node(block("import fs") + f"console.log(JSON.stringify(await write('{out}', [5, 9, 17, 4], 6)))")
    assert json.loads(said) == names["write"](str(out), [5, 9, 17, 4], 6)


@pytest.mark.slow
@pytest.mark.skipif("QEXPORT_ONNXRUNTIME" not in os.environ, reason="QEXPORT_ONNXRUNTIME names no release of it")
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_loop_of_the_documentation_in_cpp(export_folder, tmp_path, family):
    out, names, release = export_folder(family, "w8a16"), {}, Path(os.environ["QEXPORT_ONNXRUNTIME"])
    exec(next(iter(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))), names)
    (loop,) = re.findall(r"```cpp\n(.*?)```", PAGE, re.DOTALL)
    entries = ", ".join(f"{{{json.dumps(k)}, {json.dumps(v)}}}" for k, v in manifests.load(out).session.items())
    call = f'for (auto id : write("{out}", {{{entries}}}, {{5, 9, 17, 4}}, 6)) printf("%d ", (int)id);'
    (tmp_path / "loop.cc").write_text(f"#include <cstdio>\n{loop}\nint main() {{ {call} }}\n")
    command = ["g++", "-std=c++17", "loop.cc", "-o", "loop", f"-I{release}/include", f"-L{release}/lib"]
    command += ["-l:libonnxruntime.so.1", f"-Wl,-rpath,{release}/lib"]
    subprocess.run(command, cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "loop"], capture_output=True, text=True, check=True).stdout
    assert list(map(int, said.split())) == names["write"](str(out), [5, 9, 17, 4], 6)


@pytest.mark.slow
@pytest.mark.skipif(
    "QEXPORT_ONNXRUNTIME_CSHARP" not in os.environ or not shutil.which("dotnet"),
    reason="QEXPORT_ONNXRUNTIME_CSHARP names no folder with ONNX Runtime's assembly, or there is no dotnet",
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_loop_of_the_documentation_in_csharp(export_folder, tmp_path, family):
    out, names, binding = export_folder(family, "w8a16"), {}, Path(os.environ["QEXPORT_ONNXRUNTIME_CSHARP"])
    exec(next(iter(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))), names)
    (loop,) = re.findall(r"```csharp\n(.*?)```", PAGE, re.DOTALL)
    call = f'Decoder.Write("{out}", new long[] {{ 5, 9, 17, 4 }}, 6)'
    main = f'static class Program {{ static void Main() => System.Console.WriteLine(string.Join(" ", {call})); }}'
    (tmp_path / "loop.cs").write_text(f"{loop}\n{main}\n")
    version = subprocess.run(["dotnet", "--version"], capture_output=True, text=True, check=True).stdout.split(".")
    framework = f"{'net' if int(version[0]) >= 5 else 'netcoreapp'}{version[0]}.{version[1]}"
    (tmp_path / "loop.csproj").write_text(f"""<Project Sdk="Microsoft.NET.Sdk">
      <PropertyGroup><OutputType>Exe</OutputType><TargetFramework>{framework}</TargetFramework></PropertyGroup>
      <ItemGroup><Reference Include="{binding / "Microsoft.ML.OnnxRuntime.dll"}" /></ItemGroup>
    </Project>""")
    done = subprocess.run(["dotnet", "build", "-o", "built"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    paths = {"LD_LIBRARY_PATH": f"{binding}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    command = ["dotnet", tmp_path / "built" / "loop.dll"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | paths).stdout
    assert list(map(int, said.split())) == names["write"](str(out), [5, 9, 17, 4], 6)


@pytest.mark.slow
def test_transformers_js_writes_what_python_writes(node, folder, tmp_path):
    made = qexport.layout(folder, tmp_path / "web")
    script = block("import { env").replace("'./'", f"'{tmp_path}/'").replace("SESSION", json.dumps(made.session))
    script = script.replace("The moon has phases because", PROMPT).replace("20", "12")
    said = node("import { env as e } from '@huggingface/transformers'; e.allowRemoteModels = false;\n"
                + script + "console.log(JSON.stringify(generated_text))")  # fmt: skip
    (want,) = qexport.generate(folder, PROMPT, max_new_tokens=12)
    assert json.loads(said.splitlines()[-1]) == PROMPT + want
