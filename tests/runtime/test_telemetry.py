"""ONNX Runtime's telemetry stays off, and leaves nothing behind, unless the user wants it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPEN_A_SESSION = """
import sys
sys.path.insert(0, "tests")
from helpers.onnx_decoder import write_tiny_decoder
from qexport.runtime.decoder import open_decoder
folder = sys.argv[1]
from pathlib import Path
open_decoder(folder, write_tiny_decoder(Path(folder)), threads=1).generate([[5, 6]], max_new_tokens=2)
"""


def run(script: str, home: Path, *arguments: str, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ORT_", "XDG_"))}
    environment |= {"HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_nothing_appears_in_the_home_folder(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    run(OPEN_A_SESSION, home, str(tmp_path / "export"))
    assert not [str(path) for path in home.rglob("*")]


def test_what_the_user_set_stays(tmp_path):
    asked = "import os, qexport; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(asked, tmp_path, ORT_DISABLE_TELEMETRY="0") == "0"
    assert run(asked, tmp_path) == "1"
