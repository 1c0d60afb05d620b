"""A script as ranks that find one another, each in a process of its own."""

import json
import os
import socket
import subprocess
import sys
from typing import Any


def run_ranks(world: int, script: str, *words: str, what: str, **env: str) -> list[Any]:
    """What the last line of every rank says, as JSON.

    Args:
        world: how many.
        script: its path.
        words: arguments of each.
        what: is run, for the message if one fails.
        env: more of their environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)} | env
    command = [sys.executable, "-W", "ignore", script, *words]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{what}: a rank failed")
    return [json.loads(line.splitlines()[-1]) for line in said]
