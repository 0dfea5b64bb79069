"""What `qexport slice` prints."""

from ...api.slicing import SliceResult
from ...formatting import megabytes


def print_sliced(result: SliceResult) -> None:
    """How many products have fewer bits now, and how much smaller the file is."""
    print(f"{result.folder}: {result.products} products in {result.bits} bits")
    print(f"  {megabytes(result.after)} instead of {megabytes(result.before)}; qexport validate says how close it is")
