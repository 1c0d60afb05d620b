"""Sizes of the runs of `gpu.py`, and how a call is timed."""

import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

KINDS = {"window, hash": (0, 1), "CSA, routed": (4, 0), "HCA, routed": (128, 0)}
SIDES = ("ours", "ours by torch", "transformers")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class Times:
    """Sizes of a whole run, or of a tiny one."""

    def __init__(self, tiny: bool):
        self.tiny = tiny
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.sides = ("ours", "transformers") if tiny else SIDES
        self.lengths = (36,) if tiny else (4096, 16384)
        self.rounds, self.seconds = (1, 0.0) if tiny else (15, 1.5)
        self.experts = None if tiny else 64  # of the model that generates
        self.prompt, self.new = (24, 4) if tiny else (1024, 48)

    def spec(self, **changes: Any) -> Any:
        from dsv4_bridge.spec.spec import replace_spec
        from dsv4_bridge.spec.variants import VARIANTS, tiny

        flash = tiny(VARIANTS["Flash"]) if self.tiny else VARIANTS["Flash"].spec
        return replace_spec(flash.without_draft(), **changes)

    def layer(self, kind: str) -> Any:
        ratio, hashed = KINDS[kind]
        return self.spec(num_hidden_layers=1, compress_ratios=(ratio,), num_hash_layers=hashed, vocab_size=1280)


def ms(run: Callable[[], object], times: Times) -> float:
    """Median milliseconds of a call, behind one or two that warm up."""
    if not CUDA:
        taken = []
        for _ in range(times.rounds):
            began = time.perf_counter()
            run()
            taken.append((time.perf_counter() - began) * 1e3)
        return statistics.median(taken)
    began = time.perf_counter()
    run()  # compiles
    torch.cuda.synchronize()
    if time.perf_counter() - began < 5:
        run()
    taken, until = [], time.perf_counter() + times.seconds
    while len(taken) < 3 or (len(taken) < times.rounds and time.perf_counter() < until):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop))
    return statistics.median(taken)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def said(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()[-600:]


def poisoned() -> bool:
    """Whether the device does nothing more for this process, after an illegal access."""
    try:
        wait()
    except RuntimeError:
        return True
    return False
