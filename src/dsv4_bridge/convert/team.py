"""Several processes on one conversion, over nothing but a file system that all of them see.

Each rank keeps one small file, `ranks/<rank>.json` in the work folder, and writes it again every half
second; rank 0 reads all of them, the others read rank 0's. A run begins when every rank has answered
the word that rank 0 made up for it, so that files of an earlier run are never taken for partners, and it
ends when rank 0 says so. A rank that is gone is seen at once on the same machine, after a silence of
`Ranks.timeout` seconds on another: the count in its file stands still, clocks are not compared.

| state | whose file | says |
|---|---|---|
| joining | every rank's | who it is and how it was started; rank 0's: the word of this run, and who has answered it |
| working | every rank's | bytes written; rank 0's: which files each rank writes |
| done | the others' | its files are there, and what came of them |
| finished | rank 0's | the output is complete, and what came of all |
| left | the others' | they have read that |
| failed | any rank's | why; everybody stops |

torch.distributed has a store and barriers for such a thing. It is not used: importing it takes 2.4 s and 640 MB a
process (torch 2.13), three times what a conversion holds; its store dies with the process that serves it, so that a
resumed run needs what is here on disk anyway; `monitored_barrier` names a rank that is late at a barrier, not one
that died between two; and ranks need each other's ports, where a file system is enough here, whoever starts them.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BridgeError
from ..ranks import BEAT, HERE, Ranks, alive, introduction, known, read, take, who
from ..threads import ended

_PARTING = 20.0  # how long rank 0 waits for the others to take note of the end
_PAUSE = 0.1
_AGAIN = "what is finished is kept: repeat the command with --resume"


class Stopped(BridgeError):
    """The run ended on another rank.

    Attributes:
        discard: whether what is finished is of no use: the input cannot be converted.
    """

    def __init__(self, message: str, *, discard: bool = False):
        super().__init__(message)
        self.discard = discard


@dataclass
class _Peer:
    """What this rank remembers of another."""

    beat: int = -1
    since: float = field(default_factory=time.monotonic)
    nbytes: int = 0
    silent: bool = False


class Team:
    """This rank's side of one run."""

    def __init__(self, folder: Path, ranks: Ranks, facts: Mapping[str, str], label: str):
        self.folder, self.ranks, self.label = folder, ranks, label
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._trouble: Stopped | None = None
        self._lost = False  # whether another run took this rank's place
        self._peers: dict[int, _Peer] = {}
        self._advance: Callable[[int], None] = lambda n: None
        self._thread: threading.Thread | None = None
        self._mine = introduction(ranks.rank, "joining", facts)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which begins and ends the run."""
        return self.ranks.rank == 0

    @property
    def word(self) -> str:
        """What tells this rank in this run from all others."""
        return self._mine["word"]

    # ---- beginning

    def claim(self) -> None:
        """Take this rank's place in the folder.

        Raises:
            BridgeError: a process that lives has it, or an earlier run has not ended.
        """
        self._mine["made"] = [str(p) for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self._path(self.ranks.rank)
        others = self._everyone() if self.leads else {}
        busy = [self._path(r) for r, e in others.items() if e["state"] in ("working", "done") and r != self.ranks.rank]
        if there := take(own, self._mine, busy):
            raise BridgeError(
                f"{self.label}: another run is writing into {self.folder.parent.parent}, {who(there)}; wait until "
                "it has ended, or stop it"
            )
        HERE.add(self._mine["word"])
        self._thread = threading.Thread(target=self._run, daemon=True, name="ranks")
        try:
            self._thread.start()
        except BaseException:  # nobody will tell that this rank lives
            self.close()
            raise

    def meet(self) -> None:
        """Wait until every rank is here.

        Raises:
            BridgeError: one does not come, or was started with other arguments.
        """
        if self.leads:
            self._gather()
        else:
            self._answer()

    def _gather(self) -> None:
        self._tell(session=self._mine["word"])
        until = time.monotonic() + self.ranks.timeout
        while True:
            here = {r: e for r, e in self._everyone().items() if r and e["session"] == self._mine["word"]}
            members = {str(r): e["word"] for r, e in here.items()}
            if members != self._mine.get("members"):
                self._tell(members=members)
            for entry in here.values():
                self._compare(entry)
            if dead := [e for e in here.values() if known(e, self._mine["machine"]) is False]:
                raise Stopped(f"{self.label}: {who(dead[0])} died; start the command again on every rank")
            missing = [r for r in range(1, self.ranks.world) if r not in here]
            if not missing:
                break
            self._wait(until, f"rank {', '.join(map(str, missing))} of {self.ranks.world} did not come")
        with self._lock:
            self._peers = {rank: _Peer() for rank in here}

    def _answer(self) -> None:
        until = time.monotonic() + self.ranks.timeout
        while True:
            leader = read(self._path(0))
            if leader and self._belongs(leader):
                break
            if leader and leader["session"] and known(leader, self._mine["machine"]) is not False:
                if leader["state"] == "joining" and leader["session"] != self._mine["session"]:
                    self._tell(session=leader["session"])
                elif leader["state"] == "working" and alive([self._path(0)]):
                    raise BridgeError(f"{self.label}: another run is under way without this rank, {who(leader)}")
            self._wait(until, "rank 0 did not come (or ended: see its message)")
        with self._lock:
            self._peers = {0: _Peer()}

    def _belongs(self, leader: Mapping[str, Any]) -> bool:
        return leader.get("members", {}).get(str(self.ranks.rank)) == self._mine["word"]

    def _compare(self, entry: Mapping[str, Any]) -> None:
        theirs, own = entry["facts"], self._mine["facts"]
        if differing := [n for n in own if theirs.get(n) != own[n]]:
            says = "; ".join(f"{n}: {theirs.get(n)}, rank 0: {own[n]}" for n in differing)
            raise Stopped(
                f"{self.label}: {who(entry)} was started with other arguments ({says}); "
                "start the same command on every rank"
            )

    def _wait(self, until: float, what: str) -> None:
        self.check()
        if time.monotonic() > until:
            raise BridgeError(
                f"{self.label}: {what} within {self.ranks.timeout:.0f} s; start the same command on every rank, with "
                "the same OUT on a file system that all see (or unset WORLD_SIZE to run alone)"
            )
        time.sleep(_PAUSE)

    # ---- working

    def assign(self, names: list[list[str]]) -> list[str]:
        """Rank 0: say what each rank writes; its own share."""
        self._tell(state="working", shares=names)
        return names[0]

    def assignment(self) -> list[str]:
        """Another rank: wait for its share."""
        while (leader := self._leader())["state"] == "joining":
            self._pause()
        self._tell(state="working")
        shares = leader.get("shares", [])
        if self.ranks.rank >= len(shares):
            raise Stopped(f"{self.label}: {who(leader)} gives this rank no share; {_AGAIN}")
        return shares[self.ranks.rank]

    def watch(self, advance: Callable[[int], None]) -> None:
        """Rank 0: have `advance` called with the bytes that other ranks have written."""
        self._advance = advance

    def wrote(self, nbytes: int) -> None:
        """Count bytes that are on disk; told with the next beat."""
        with self._lock:
            self._mine["nbytes"] += nbytes

    def check(self) -> None:
        """Go on only while the others do.

        Raises:
            Stopped: a rank failed or is gone.
        """
        if self._trouble:
            raise self._trouble

    def confirm(self) -> None:
        """The same, of this very moment: a process that slept may have been given up for dead.

        Raises:
            Stopped: a rank failed or is gone, or another run began.
        """
        self._own_place()
        self.check()

    # ---- ending

    def results(self) -> list[dict[str, Any]]:
        """Rank 0: wait until all files of the others are there; what came of them."""
        found: dict[int, dict[str, Any]] = {}
        while True:
            for rank in self._peers:
                entry = read(self._path(rank))
                if rank not in found and entry and entry["state"] == "done":
                    found[rank] = entry["result"]
            self.check()
            if len(found) == len(self._peers):
                return list(found.values())
            time.sleep(_PAUSE)

    def hand_in(self, result: dict[str, Any]) -> dict[str, Any]:
        """Another rank: say that its files are there and what came of them; wait for the sum of all."""
        self._tell(state="done", result=result)
        while (leader := self._leader())["state"] != "finished":
            self._pause()
        self._fall_silent()
        self._tell(state="left")
        return leader["result"]

    def finish(self, result: dict[str, Any]) -> None:
        """Rank 0: say that the output is complete and what came of it."""
        self._tell(state="finished", result=result)
        self._part()

    def fail(self, error: BaseException, *, discard: bool) -> None:
        """Say that this rank has failed; rank 0 waits until the others have stopped."""
        if not self.leads:
            self._fall_silent()
        self._tell(state="failed", error=str(error) or "interrupted", told=isinstance(error, Stopped), discard=discard)
        if self.leads:
            self._part()

    def close(self) -> None:
        """Stop telling; rank 0 takes the folder away. Folders that were made and hold nothing go, too."""
        self._fall_silent()
        made = set(self._mine["made"])
        if self._mine["word"] in HERE and not self._lost:
            if self.leads:
                made.update(*(entry.get("made", []) for entry in self._everyone().values()))
                shutil.rmtree(self.folder, ignore_errors=True)
            elif not self._peers:  # nobody knows of this rank
                self._path(self.ranks.rank).unlink(missing_ok=True)
        HERE.discard(self._mine["word"])
        ours = {str(p) for p in (self.folder, *self.folder.parents)}  # others may name any
        for folder in sorted({*(made & ours), str(self.folder), str(self.folder.parent)}, key=len, reverse=True):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()

    def _fall_silent(self) -> None:
        """No more beats: after its last word a rank writes nothing into a folder that may go at any moment."""
        self._closing.set()
        ended(self._thread)

    def _part(self) -> None:
        """Wait until the others have left, failed or are gone."""
        until = time.monotonic() + _PARTING
        for rank in self._peers or [int(r) for r in self._mine.get("members", {})]:
            while time.monotonic() < until and not (rank in self._peers and self._peers[rank].silent):
                entry = read(self._path(rank))
                if not entry or entry["state"] in ("left", "failed") or known(entry, self._mine["machine"]) is False:
                    break
                time.sleep(0.02)

    # ---- the files

    def _path(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def _everyone(self) -> dict[int, dict[str, Any]]:
        found = {p: read(p) for p in self.folder.glob("*.json")}
        return {e["rank"]: e for p, e in found.items() if e and p == self._path(e["rank"])}

    def _leader(self) -> dict[str, Any]:
        self.check()
        leader = read(self._path(0))
        self._look(0, leader)
        self.check()
        assert leader
        return leader

    def _pause(self) -> None:
        self.check()
        time.sleep(_PAUSE)

    def _tell(self, **facts: Any) -> None:
        with self._lock:
            self._mine |= facts
            if not self._lost:
                self._write()

    def _write(self) -> None:
        self._mine["beat"] += 1
        path = self._path(self.ranks.rank)
        part = path.with_name(f"{path.name}.{self._mine['word']}")
        # A full disk shows where the weights are written; a beat that is missed may come later.
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(self._mine))
            part.replace(path)

    def _run(self) -> None:
        while not self._closing.wait(BEAT):
            if not self._own_place():
                return
            self._tell()
            with self._lock:
                peers = list(self._peers)
            for rank in peers:
                self._look(rank, read(self._path(rank)))

    def _own_place(self) -> bool:
        with self._lock:
            own = read(self._path(self.ranks.rank))
        if own is None or own["word"] != self._mine["word"]:
            self._lost = True
            self._stop("another run took this rank's place")
        return not self._lost

    def _look(self, rank: int, entry: dict[str, Any] | None) -> None:
        """Take note of what another rank says, or does not."""
        peer = self._peers[rank]
        words = (self._mine["session"], self._mine.get("members", {}).get(str(rank)))
        if entry is None or entry["word"] not in words:
            self._stop(f"rank {rank} has left; {_AGAIN}")
            return
        if entry["state"] == "failed":
            what = entry["error"] if entry["told"] else f"{who(entry)} failed: {entry['error']}"
            self._stop(what, discard=entry["discard"], labelled=entry["told"])
        if entry["state"] in ("failed", "done", "left", "finished"):
            self._advance_to(peer, entry["nbytes"])
            return
        now = time.monotonic()
        if known(entry, self._mine["machine"]) is False:
            self._stop(f"{who(entry)} died; {_AGAIN}, with any number of ranks")
        elif entry["beat"] != peer.beat:
            peer.beat, peer.since = entry["beat"], now
            self._advance_to(peer, entry["nbytes"])
        elif now - peer.since > self.ranks.timeout:
            peer.silent = True
            self._stop(f"{who(entry)} has said nothing for {self.ranks.timeout:.0f} s; {_AGAIN} once it has ended")

    def _advance_to(self, peer: _Peer, nbytes: int) -> None:
        more, peer.nbytes = nbytes - peer.nbytes, nbytes
        if more > 0:
            self._advance(more)

    def _stop(self, what: str, *, discard: bool = False, labelled: bool = False) -> None:
        if self._trouble is None:
            self._trouble = Stopped(what if labelled else f"{self.label}: {what}", discard=discard)
