"""Real processes that meet over gloo on this machine."""

import json
from pathlib import Path
from typing import Any

import torch
from warm import run_world

# Process groups that were destroyed leave threads behind: a process makes so many cases at most.
MANY = 12
WORKER = Path(__file__).with_name("rank_worker.py")


def run_ranks(folder: Path, tag: str, world: int, cases: list[dict[str, Any]], **told: Any) -> list[list[Any]]:
    """Run cases of rank_worker.py in `world` processes: for every case, what each rank returned."""
    if len(cases) > MANY:
        first = run_ranks(folder, f"{tag}.{len(cases)}", world, cases[:MANY], **told)
        return first + run_ranks(folder, tag, world, cases[MANY:], **told)
    instructions = folder / f"{tag}.json"
    instructions.write_text(json.dumps(told | {"tag": tag, "folder": str(folder), "cases": cases}, default=str))
    limit = 300 + 30 * len(cases)
    run_world(world, WORKER, instructions, said=folder / tag, timeout=limit, OMP_WAIT_POLICY="passive")
    found = [torch.load(folder / f"{tag}.rank{r}.pt", weights_only=False) for r in range(world)]
    return [list(case) for case in zip(*found, strict=True)]


def whole(results: list[Any], what: str) -> dict[str, torch.Tensor]:
    """Whole items, put together from the boxes that the ranks hold; copies must agree."""
    boxes: dict[str, dict[tuple[Any, ...], torch.Tensor]] = {}
    for result in results:
        for name, held in result[what].items():
            for start, stop, columns, values in held:
                known = boxes.setdefault(name, {}).setdefault((start, stop, columns), values)
                close = 1e-6 * float(known.abs().max() + 1e-30) if known.is_floating_point() else 0
                assert torch.allclose(known, values, rtol=1e-5, atol=close), name
    return {name: _joined(name, parts) for name, parts in boxes.items()}


_SINGLE = {"scale": "base", "alpha_pre": "bias", "alpha_post": "bias", "alpha_res": "bias"}


def with_scales(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Single numbers, sums over all tokens that nearly cancel, along with the vectors beside them; under any names."""
    found = dict(gradients)
    for name in gradients:
        end = next((end for end in _SINGLE if name.endswith(end)), "")
        vector = name.removesuffix(end) + _SINGLE.get(end, "")
        if end and vector in found:
            found[vector] = torch.cat([found[vector], found.pop(name).view(-1)])
    return found


def _joined(name: str, parts: dict[tuple[Any, ...], torch.Tensor]) -> torch.Tensor:
    rows, width = max(stop for _, stop, _ in parts), max(columns[1] for _, _, columns in parts)
    first = next(iter(parts.values()))
    joined = torch.full((rows,) if first.ndim == 1 else (rows, width), -123456, dtype=first.dtype)
    for (start, stop, columns), values in parts.items():
        joined[(slice(start, stop),) if first.ndim == 1 else (slice(start, stop), slice(*columns))] = values
    assert not (joined == -123456).any(), f"{name} is not whole"
    return joined


def losses(results: list[Any], what: str = "losses") -> list[float]:
    """Losses of the last pipeline stage."""
    return next(r[what] for r in results if r[what])
