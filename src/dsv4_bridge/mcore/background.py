"""Checkpoints written while training goes on, by a thread.

megatron-core forks a process for it and hands results back through a `multiprocessing` Manager, which is a process
of its own: a signal to the group, as a terminal, `timeout` or Slurm sends it, ends it in the middle of a save, and
starting it runs a script without a `__main__` guard once more.
"""

import threading
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncCallsQueue

from ..threads import ended


class BackgroundQueue(AsyncCallsQueue):
    """megatron-core's queue of checkpoints being written, each by a thread of this process."""

    def _get_async_caller(self) -> AsyncCaller:  # type: ignore[override]
        return _Thread()


class _Thread(AsyncCaller):
    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def schedule_async_call(self, async_req: Any) -> None:
        if async_req.async_fn is None:
            return
        args = list(async_req.async_fn_args)
        if async_req.preload_fn is not None:
            args[1] = async_req.preload_fn()  # to the host
        if not torch.cuda.is_available():  # they are the live ones: a fork would have seen them as they are now
            args[1] = [
                (path, key, (raw, [(i, t.clone()) for i, t in tensors])) for path, key, (raw, tensors) in args[1]
            ]
        self._thread = threading.Thread(
            target=async_req.async_fn, args=args, kwargs=async_req.async_fn_kwargs, name="checkpoint"
        )
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        alive = self._thread is not None and self._thread.is_alive()
        done = not alive if no_dist else self.sync_all_async_calls(int(alive))
        if done or blocking:
            self.close()
            return True
        return False

    def close(self, abort: bool = False) -> None:
        ended(self._thread)
        self._thread = None

    def __del__(self) -> None:
        pass
