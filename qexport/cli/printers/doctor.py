"""What `qexport doctor` prints."""

from collections.abc import Sequence

from ...runtime.doctor import Check


def print_checks(checks: Sequence[Check]) -> None:
    """One line for each thing looked at, and the remedy below where there is one."""
    for check in checks:
        mark = "ok" if check.ok else "no" if check.optional else "BAD"
        print(f"{mark:<4}{check.name:<26}{check.detail}")
        if check.remedy:
            print(f"{'':<30}{check.remedy}")
