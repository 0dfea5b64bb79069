import json

import torch

import qexport
from qexport.validation.environment import settings, versions


def test_settings_are_what_repeats_the_run_and_keep_no_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("words")
    assert settings(tmp_path, file, windows=2) == {"reference": tmp_path.name, "text": file.name, "windows": 2}
    assert settings("some/model", None) == {"reference": "some/model", "text": None}
    for given in ("~nobody said so", "long " * 5000, "two\nlines\0"):
        assert settings(torch.nn.Linear(1, 1), given) == {"reference": None, "text": "TEXT"}


def test_versions_are_strings():
    found = versions()
    assert found["qexport"] == qexport.__version__ and json.loads(json.dumps(found)) == found
    assert {"onnxruntime", "torch", "transformers", "python"} <= found.keys()
