"""`python -m dsv4_bridge.cli` is the `dsv4` command."""

from . import main

main()
