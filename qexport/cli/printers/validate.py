"""What `qexport validate` prints."""

from ...report.facts import overrides_yaml
from ...validation import Report, summary_rows, worst_linears
from ..console import print_table


def print_validation(report: Report) -> None:
    """The measures and the verdict; of two parts what is to be said of both together."""
    print_table(["measure", "value", "what it means"], [list(row) for row in summary_rows(report)])
    if worst := worst_linears(report):
        print("\nThe linears with the largest errors of their own:\n")
        columns = ["linear", "SQNR", "bits a weight", "kernel", "of a prompt's time"]
        print_table(columns, [list(row) for row in worst])
    print()
    for sentence in report.verdict:
        print(f"- {sentence}")
    if suggested := overrides_yaml(report):
        print(f"\nWhat would buy back the most KL for a byte, for the recipe:\n\n{suggested}", end="")
