"""Check the types of the whole package, `passes/` included.

    python tools/typecheck.py [OPTIONS OF MYPY]

`passes/` lies beside the package and is imported as `qexport.passes`. mypy finds modules by folders alone, so this lays
links to both into one folder, checks that, and names files as they are in the repository. Settings are in
pyproject.toml.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_CACHE = ROOT / ".cache"


def link(into: Path) -> None:
    """Make the folder `into`/qexport, whose entries are links to the package's, and to `passes/`."""
    package = into / "qexport"
    if package.exists():
        shutil.rmtree(package)
    package.mkdir(parents=True)
    for path in [*(ROOT / "qexport").iterdir(), ROOT / "passes"]:
        (package / path.name).symlink_to(path, target_is_directory=path.is_dir())


def in_repository(text: str) -> str:
    """What mypy said of linked files, by their names in the repository."""
    lines = text.splitlines(keepends=True)
    return "".join(line.removeprefix("qexport/") if line.startswith("qexport/passes/") else line for line in lines)


def main() -> int:
    linked = _CACHE / "types"
    link(linked)
    settings, cache = ROOT / "pyproject.toml", _CACHE / "mypy"
    command = [sys.executable, "-m", "mypy", "--config-file", settings, "--cache-dir", cache, *sys.argv[1:]]
    run = subprocess.run([*command, "-p", "qexport"], cwd=linked, stdout=subprocess.PIPE, text=True)
    print(in_repository(run.stdout), end="")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
