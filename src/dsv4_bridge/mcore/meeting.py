"""How ranks find each other, with a word about who is missing instead of a long silence."""

import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from ..errors import BridgeError

_QUIET = 10.0  # seconds until it is said that others are waited for
_PAUSE = 0.1
_TRY = 5.0  # seconds of one attempt to reach rank 0
_DEFAULT = 300.0
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_START = (
    "start every rank with torchrun (torchrun --nproc-per-node N -m dsv4_bridge …), or unset RANK and WORLD_SIZE to "
    "run alone"
)


def meet(backend: str, env: Mapping[str, str] = os.environ) -> None:
    """Make the default process group: of the ranks that the environment names, or of this process alone.

    Args:
        backend: of torch.distributed.
        env: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them; DSV4_RANK_TIMEOUT, seconds to wait
            for a rank that does not come.

    Raises:
        BridgeError: a variable that is missing or makes no sense, a port in use, a rank that does not come, no
            network interface.
    """
    if "RANK" not in env or "WORLD_SIZE" not in env:
        _group(backend, HashStore(), 0, 1)
        return
    world = _number(env, "WORLD_SIZE", 1, 1 << 20)
    rank = _number(env, "RANK", 0, world - 1)
    if lacking := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]:
        raise BridgeError(
            f"joining {world} ranks as rank {rank}: {' and '.join(lacking)} not set, where rank 0 is; {_START}"
        )
    address = env["MASTER_ADDR"], _number(env, "MASTER_PORT", 1, 65535)
    limit = float(_number(env, "DSV4_RANK_TIMEOUT", 1, 1 << 20)) if "DSV4_RANK_TIMEOUT" in env else _DEFAULT
    until = time.monotonic() + limit
    leads = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun's agent holds the store
    told = _Told(rank, world)
    store = _store(address, world, rank, leads, until, told)
    # A run that torchrun started anew has the same store.
    roll = PrefixStore(f"dsv4/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    roll.set(f"here/{rank}", "1")
    while missing := [r for r in range(world) if not roll.check([f"here/{r}"])]:
        if time.monotonic() > until:
            raise BridgeError(
                f"joining {world} ranks as rank {rank}: {_ranks(missing)} did not come within {limit:.0f} s; look at "
                "what they say, and start the same command on every rank"
            )
        told.waits_for(_ranks(missing))
        time.sleep(_PAUSE)
    _group(backend, PrefixStore("group", roll), rank, world)


def _group(backend: str, store: Any, rank: int, world: int) -> None:
    """The group itself: even a process alone opens a socket for it."""
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    except RuntimeError as error:
        said = str(error).partition("\n")[0].rpartition("] ")[2][:200]
        who = f"joining {world} ranks as rank {rank}" if world > 1 else "starting one process"
        if not re.search("Unable to find (address|interface)", said):  # gloo's words
            raise BridgeError(f"{who}: the process group of {backend} could not be made ({said})") from None
        named = [f"{name}={os.environ[name]}" for name in _INTERFACES if name in os.environ]
        hint = f"correct {' and '.join(named)}, or unset it" if named else "is the loopback interface up?"
        raise BridgeError(f"{who}: torch finds no network interface to use ({said}); {hint}") from None


class _Told:
    """Says once, after a while, what is waited for."""

    def __init__(self, rank: int, world: int):
        self._since, self._said = time.monotonic(), False
        self._who = f"rank {rank} of {world}"

    def waits_for(self, whom: str) -> None:
        if not self._said and time.monotonic() - self._since > _QUIET:
            self._said = True
            sys.stderr.write(f"dsv4: {self._who} waits for {whom}\n")


def _store(address: tuple[str, int], world: int, rank: int, leads: bool, until: float, told: _Told) -> Any:
    from datetime import timedelta

    where = f"{address[0]}:{address[1]}"
    while True:
        try:
            left = max(1.0, until - time.monotonic())
            seconds = left if leads else min(_TRY, left)
            return TCPStore(
                *address, world, leads, timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=leads
            )
        except (dist.DistError, RuntimeError, ValueError) as error:
            said = str(error).partition("\n")[0]
            if leads:
                hint = (
                    "; choose another MASTER_PORT" if "address already in use" in said.lower() else f" ({said[:200]})"
                )
                what = "that port is in use" if hint.startswith(";") else "that cannot be listened on"
                raise BridgeError(f"joining {world} ranks as rank 0 at {where}: {what}{hint}") from None
            if time.monotonic() > until:
                raise BridgeError(
                    f"joining {world} ranks as rank {rank}: rank 0 is not to be reached at {where} ({said[:200]}); "
                    "check MASTER_ADDR and MASTER_PORT, and that rank 0 runs"
                ) from None
            told.waits_for(f"rank 0 at {where}")


def _number(env: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = env[name]
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
        raise BridgeError(f"{name} is {text[:40]!r} in the environment, expected {least} to {most}")
    return int(text)


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (" …" if len(numbers) > 8 else "")
    return f"rank{'s' * (len(numbers) > 1)} {shown}"
