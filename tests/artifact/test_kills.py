"""The kill test of the samples: nothing lost at any instant, nothing left after the next run."""

import subprocess
import sys
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parents[2] / "samples" / "kills.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks and SIGKILL")
def test_kills_leave_nothing(tmp_path):
    page = tmp_path / "kills.md"
    done = subprocess.run([sys.executable, SAMPLE, "--out", page], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[3:8] for line in page.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 8 and all(int(kills) > 5 and int(dirty) > 0 for kills, dirty, *_ in rows)
    assert all(int(count) == 0 for row in rows for count in row[2:])
