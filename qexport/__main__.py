"""`python -m qexport` is `qexport`."""

from .cli import main

main()
