"""Where the time of one step goes: torch's profiler, a table to read and a trace to open."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

PHASES = ("data", "forward and backward", "optimizer", "counts")
_ROWS = 25


@contextlib.contextmanager
def taken_apart(out: Path, step: int, rank: int, say: Callable[[str], None]) -> Iterator[None]:
    """Profile the block, which makes one step, and write what came out to `profile/` in the output folder.

    Args:
        out: the run's folder.
        step: number of the step.
        rank: of this process.
        say: prints a line.
    """
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        yield
        if gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    path = out / "profile" / f"step-{step}-rank-{rank}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(_table(profiler.key_averages(), step, rank, seconds, gpu)) + "\n")
        profiler.export_chrome_trace(str(path.with_suffix(".json.gz")))
    except (OSError, RuntimeError) as error:
        say(f"the profile of step {step} cannot be written to {path.parent} ({error}); the run goes on without it")
    else:
        say(f"step {step} taken apart: {path}, and a trace for a browser's viewer beside it")


def phase(name: str) -> Any:
    """A part of a step, in the profile."""
    return torch.profiler.record_function(name)


def _table(events: Iterable[Any], step: int, rank: int, seconds: float, gpu: bool) -> Iterator[str]:
    found = [event for event in events if not event.key.startswith("ProfilerStep")]
    yield f"step {step} of rank {rank}: {seconds:.4f} s, with the profiler's own time"
    yield ""
    yield f"{'part':<24}{'seconds':>10}{'share':>9}"
    left = seconds
    for name in PHASES:
        took = max((event.cpu_time_total for event in found if event.key == name), default=0.0) / 1e6
        left -= took
        yield f"{name:<24}{took:>10.4f}{took / seconds:>9.1%}"
    yield f"{'the rest':<24}{left:>10.4f}{left / seconds:>9.1%}"
    if gpu:
        yield "The parts as the CPU sees them: it hands work to the GPU and goes on."
    where = "GPU" if gpu else "CPU"
    operations = [(_own(event, gpu) / 1e6, event) for event in found if event.key not in PHASES]
    total = sum(took for took, _ in operations) or 1.0
    yield ""
    yield f"Time on the {where} of each operation alone, without those that it calls; the first {_ROWS}."
    yield ""
    yield f"{'seconds':>10}{'share':>8}{'calls':>9}  operation"
    for took, event in sorted(operations, key=lambda pair: -pair[0])[:_ROWS]:
        yield f"{took:>10.4f}{took / total:>8.1%}{event.count:>9,}  {event.key[:120]}"


def _own(event: Any, gpu: bool) -> float:
    """Microseconds of an operation alone."""
    return event.self_device_time_total if gpu else event.self_cpu_time_total
