"""Real processes that meet over gloo on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WORKER = Path(__file__).with_name("rank_worker.py")


def run_ranks(folder: Path, tag: str, world: int, action: str, **told: Any) -> list[Any]:
    """Run an action of rank_worker.py in `world` processes; what each returned."""
    told |= {"tag": tag, "folder": str(folder), "action": action}
    instructions = folder / f"{tag}.json"
    instructions.write_text(json.dumps(told, default=str))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), str(instructions)],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=300)[0])
    finally:
        for process in processes:
            process.kill()
    for rank, (process, said) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {tag}:\n{said[-4000:]}"
    return [torch.load(folder / f"{tag}.rank{r}.pt", weights_only=False) for r in range(world)]


def whole_gradients(results: list[Any]) -> dict[str, torch.Tensor]:
    """Gradients of whole items, put together from what the ranks hold; copies must agree."""
    boxes: dict[str, dict[tuple[Any, ...], torch.Tensor]] = {}
    for result in results:
        for name, held in result["gradients"].items():
            for start, stop, columns, grad in held:
                known = boxes.setdefault(name, {}).setdefault((start, stop, columns), grad)
                assert torch.allclose(known, grad, rtol=1e-5, atol=1e-7 * float(known.abs().max() + 1e-30)), name
    found = {}
    for name, parts in boxes.items():
        rows = max(stop for _, stop, _ in parts)
        width = max(columns[1] for _, _, columns in parts)
        vector = next(iter(parts.values())).ndim == 1
        whole = torch.full((rows,) if vector else (rows, width), float("nan"))
        for (start, stop, columns), grad in parts.items():
            box = (slice(start, stop),) if vector else (slice(start, stop), slice(*columns))
            whole[box] = grad
        assert not whole.isnan().any(), name
        found[name] = whole
    return found
