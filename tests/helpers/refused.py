"""How a command fails that was asked for what cannot be: one message, and nothing left behind."""

from pathlib import Path


def refused(result, *parts) -> str:
    """Checks that a command failed as expected errors do; returns the message."""
    code, out, err = result
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and out == ""
    assert len(errors) == 1 and err.splitlines()[-1] == errors[0] and "Traceback" not in err
    for part in parts:
        assert str(part) in errors[0]
    return errors[0]


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "copy")
