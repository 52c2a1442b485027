"""`python -m meristem`: the command."""

from meristem.cli import main

main()
