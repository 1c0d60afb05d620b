"""The processes that share a conversion: which one this is, what each writes, and which of them live.

A rank is known by the small file that it keeps writing (see `team`): here is how one is read.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from .errors import BridgeError

BEAT = 0.5  # seconds between two writes of a rank's file
_STALE = 10.0  # a file of another machine that did not change for so long is an old run's
_DOOR = 60.0  # how long a process waits for others that begin at the same moment
_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "rank": int,
    "word": str,
    "session": str,
    "state": str,
    "facts": dict,
    "host": str,
    "machine": str,
    "pid": int,
    "began": (str, NoneType),
    "beat": int,
    "nbytes": int,
}
# Said by some, at some time.
_FURTHER: Mapping[str, type] = {
    "members": dict,
    "shares": list,
    "result": dict,
    "error": str,
    "told": bool,
    "discard": bool,
    "made": list,
}
_STATES = ("joining", "working", "done", "finished", "failed", "left", "holding")
# What a state cannot be without.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "done": ("result",),
    "finished": ("result",),
    "failed": ("error", "told", "discard"),
}
_MOST_BYTES = 64 << 20
HERE: set[str] = set()  # words of the runs in this process


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a conversion.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        timeout: seconds to wait for a rank that says nothing.
    """

    rank: int = 0
    world: int = 1
    timeout: float = 300.0

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> "Ranks":
        """What RANK, WORLD_SIZE (set by torchrun) and DSV4_RANK_TIMEOUT say; alone without them.

        Raises:
            BridgeError: a value that makes no sense.
        """
        world = _whole_number(env, "WORLD_SIZE", 1, 1)
        if world > 1 and "RANK" not in env:
            raise BridgeError(f"WORLD_SIZE is {world} and RANK is not set: set both, or unset WORLD_SIZE to run alone")
        rank = _whole_number(env, "RANK", 0, 0) if world > 1 else 0
        if rank >= world:
            raise BridgeError(f"RANK is {rank}, expected less than WORLD_SIZE, {world}")
        return cls(rank, world, _whole_number(env, "DSV4_RANK_TIMEOUT", 300, 1))


def slurm_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, of a process that srun started; empty where it did not, or torchrun did.

    A batch script is one process, whatever its job asked for: a step of several tasks is what counts.

    Args:
        env: SLURM_STEP_NUM_TASKS, SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID and SLURM_STEP_ID.
    """
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    tasks, rank, local, nodes = (env.get(name, "") for name in names)
    told = any(name in env for name in ("RANK", "WORLD_SIZE"))
    if told or not (tasks.isdecimal() and rank.isdecimal() and int(tasks) > 1):
        return {}
    found = {"RANK": rank, "WORLD_SIZE": tasks, "LOCAL_RANK": local or "0"}
    if (host := _first_host(nodes)) and "MASTER_ADDR" not in env:
        found["MASTER_ADDR"] = host
    if "MASTER_PORT" not in env:  # steps of one node at the same time have ports of their own
        job, step = (
            int(n) if (n := env.get(name, "")).isdecimal() else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")
        )
        found["MASTER_PORT"] = str(20_000 + (job * 31 + step) % 10_000)
    return found


def _first_host(nodes: str) -> str:
    """Of a list as Slurm writes it: `node7`, `node[07-09,12],login1`, `rack[1-2]n[3-4]`."""
    found, depth = "", 0
    for char in nodes:
        if char == "[":
            depth = 1
        elif char == "]":
            depth = 0
        elif depth and char in "-,":
            depth = 2  # the rest of the bracket names later hosts
        elif not depth and char == ",":
            break
        elif depth < 2:
            found += char
    return found


def _whole_number(env: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = env.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise BridgeError(f"{name} is {text!r} in the environment, expected a whole number from {least} on")
    return int(text)


def shares(sizes: Iterable[tuple[str, int]], world: int) -> list[list[str]]:
    """The names that each rank writes: largest first, to whoever has least.

    Args:
        sizes: name and bytes of every file.
        world: number of ranks.
    """
    found: list[list[str]] = [[] for _ in range(world)]
    load = [0] * world
    for name, nbytes in sorted(sizes, key=lambda pair: (-pair[1], pair[0])):
        least = load.index(min(load))
        found[least].append(name)
        load[least] += nbytes
    return found


# ---------------------------------------------------------------- who is alive


def this_machine() -> str:
    """Same for processes that see each other's numbers, and differs otherwise."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return f"unknown {uuid.uuid4()}"


def began(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def introduction(rank: int, state: str, facts: Mapping[str, str]) -> dict[str, Any]:
    """What this process writes of itself first, under a word that nobody else has."""
    return {
        "rank": rank,
        "word": uuid.uuid4().hex,
        "session": "",
        "state": state,
        "facts": dict(facts),
        "host": platform.node(),
        "machine": this_machine(),
        "pid": os.getpid(),
        "began": began(os.getpid()),
        "beat": 0,
        "nbytes": 0,
    }


def read(path: Path) -> dict[str, Any] | None:
    """What a rank last wrote; None if there is no such file, or it says something else."""
    for _ in range(5):
        try:
            if not path.is_file() or path.stat().st_size > _MOST_BYTES:  # a pipe would be waited for
                return None
            entry = json.loads(path.read_bytes())
            return entry if _valid(entry) else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):  # it is being replaced at this moment
            time.sleep(0.02)
    return None


def _valid(entry: Any) -> bool:
    if not isinstance(entry, dict) or any(n not in entry or not _is(entry[n], t) for n, t in _FIELDS.items()):
        return False
    return (
        all(_is(entry[n], t) for n, t in _FURTHER.items() if n in entry)
        and entry["state"] in _STATES
        and all(n in entry for n in _NEEDED.get(entry["state"], ()))
        and all(isinstance(value, str) for value in entry["facts"].values())
        and all(isinstance(x, str) for x in (*entry.get("members", {}).values(), *entry.get("made", ())))
        and all(isinstance(s, list) and all(isinstance(n, str) for n in s) for s in entry.get("shares", ()))
        and all(0 <= entry[n] < 1 << 63 for n in ("rank", "beat", "nbytes", "pid"))
    )


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def who(entry: Mapping[str, Any]) -> str:
    """A rank, for people."""
    return f"rank {entry['rank']} (process {entry['pid']} on {entry['host']})"


def known(entry: Mapping[str, Any], machine: str) -> bool | None:
    """Whether a process is alive, where that can be told at once."""
    if entry["machine"] != machine:
        return None
    if entry["pid"] == os.getpid():
        return entry["word"] in HERE
    return began(entry["pid"]) == entry["began"]


def alive(paths: Iterable[Path]) -> dict[str, Any] | None:
    """What the first of some ranks says whose process lives; None if none does. Takes a while for other machines."""
    machine, unsure = this_machine(), {}
    for path in paths:
        entry = read(path)
        lives = entry and known(entry, machine)
        if lives:
            return entry
        if entry and lives is None:
            unsure[path] = entry
    until = time.monotonic() + _STALE
    while unsure and time.monotonic() < until:
        time.sleep(BEAT)
        for path, entry in unsure.items():
            now = read(path)
            if now and (now["word"], now["beat"]) != (entry["word"], entry["beat"]):
                return now
    return None


def take(path: Path, entry: Mapping[str, Any], others: Iterable[Path] = ()) -> dict[str, Any] | None:
    """Put `entry` where a living process has not put its own; the entry of the one that has, otherwise.

    Args:
        path: the file of the place; what a dead process left there is replaced.
        entry: what this process says of itself.
        others: places that must not be taken either.

    Raises:
        OSError: the folder cannot be written.
    """
    with _door(path.parent):
        if there := alive([path, *others]):
            return there
        for left in (path, *path.parent.glob(f"{path.name}.*")):
            left.unlink(missing_ok=True)
        try:
            with path.open("x") as file:
                file.write(json.dumps(dict(entry)))
        except FileExistsError:  # another machine, where the file system's locks do not reach
            return read(path) or {**entry, "host": "another machine", "pid": "?"}
    return None


@contextlib.contextmanager
def _door(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks: looking and taking are one act."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + _DOOR
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES) and time.monotonic() < until:
                    time.sleep(0.02)
                    continue
            break
        yield
    finally:
        os.close(fd)
