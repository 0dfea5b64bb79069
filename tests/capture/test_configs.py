"""A config.json that no model can have is refused by the name of its key, before anything is built."""

import json
import shutil
import time

import pytest

from qexport.errors import InputError
from qexport.models.source import open_model


@pytest.fixture
def changed(model_folder, tmp_path):
    """changed(key=value, ...): a small Llama whose config says so."""

    def change(**values):
        folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return folder

    return change


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "64"}, r"hidden_size|transformers understands"),
        ({"num_attention_heads": 0}, r"num_attention_heads|transformers understands"),
        ({"num_key_value_heads": -2}, "num_key_value_heads|transformers understands"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: is not a finite number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_theta: is not a finite"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta: input should be greater than"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers: is 1,000,000,000, but the checkpoint has \d+ tensors"),
        ({"vocab_size": 10**12}, "vocab_size: is 1,000,000,000,000, but the checkpoint has fewer than"),
        ({"intermediate_size": 2**63}, "intermediate_size: is 9,223,372,036,854,775,808, but the checkpoint has fewer"),
        ({"architectures": [{"a": 1}]}, "architectures|transformers understands"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings|transformers understands"),
        ({"eos_token_id": 1.5}, "eos_token_id|transformers understands"),
        ({"x": [[[]]] * 3, "y": None}, None),
        ({"time_step_limit": [0.0, float("inf")]}, None),
    ],
)
def test_values_that_no_model_has(changed, values, message):
    folder, started = changed(**values), time.monotonic()
    if message is None:
        assert open_model(folder).config.hidden_size
        return
    with pytest.raises(InputError, match=message) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value) and time.monotonic() - started < 10


def test_nesting_that_would_run_out_of_stack(changed):
    folder = changed()
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(InputError, match="config.json: unreadable"):
        open_model(folder)
