"""`python -m dsv4_bridge` is the `dsv4` command."""

from .cli import main

main()
