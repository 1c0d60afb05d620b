"""The power fails at every moment: what the disk then holds never looks whole unless it is, and can be gone on from.

    python benchmarks/power_loss.py                   # every verb, every moment, three kinds of file system
    python benchmarks/power_loss.py import --every 5

A verb runs once under a shim that remembers, at every system call that names or syncs something, what the disk is
sure to hold. Three file systems are played:

    strict    a file's bytes are there once it was synced, a name once its folder was synced
    ordered   names are there as of the last sync of anything; bytes once the file was synced (ext4, xfs)
    ahead     every name is there already; bytes once the file was synced

Files that were not synced are empty. Of each state: does it look like a checkpoint and differ from both the new and
the old one (wrong); does the command, given again, end in the new bytes (else lost)?
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODELS = ("strict", "ordered", "ahead")
Listing = dict[int, dict[str, int]]  # inode of a folder -> name -> inode
_WATCHED = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "link", "symlink")


@dataclass(frozen=True)
class State:
    """What one kind of file system holds at one moment.

    Attributes:
        moment: number of the system call that comes next.
        call: its name.
        model: the kind of file system.
        names: what the folders hold.
        contents: inode -> copy of the bytes that were synced; a file that is not here is empty.
        root: inode of the top folder.
    """

    moment: int
    call: str
    model: str
    names: Listing
    contents: dict[int, Path]
    root: int

    @property
    def key(self) -> Any:
        """Equal for states that are the same on the disk."""
        return tuple(self._walk(self.root, ""))

    def _walk(self, inode: int, at: str) -> Iterator[tuple[str, str]]:
        for name, child in sorted(self.names[inode].items()):
            if child in self.names:
                yield f"{at}{name}/", ""
                yield from self._walk(child, f"{at}{name}/")
            else:
                yield f"{at}{name}", str(self.contents.get(child, ""))

    def make(self, folder: Path) -> None:
        """Lay the state out as a folder."""
        folder.mkdir(parents=True)
        for name, content in self.key:
            path = folder / name
            if name.endswith("/"):
                path.mkdir(parents=True, exist_ok=True)
            elif content:
                shutil.copy2(content, path)  # with the time of the last write
            else:
                path.touch()


@dataclass
class Shim:
    """Watches the calls below one folder; `states` are what the disk may hold before each of them."""

    root: Path
    store: Path
    states: list[State] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)
    synced: dict[int, Path] = field(default_factory=dict)
    names: dict[str, Listing] = field(default_factory=dict)
    copies: int = 0
    folders: set[int] = field(default_factory=set)  # inodes that are or were folders
    held: dict[int, int] = field(default_factory=dict)  # inode -> descriptor: a number in use is not given again

    def __post_init__(self) -> None:
        for path in self.root.rglob("*"):
            if path.is_file():
                self._keep(path, path.stat().st_ino)
        everything = self._look()
        self.names = {"strict": dict(everything), "ordered": everything}

    def _look(self) -> Listing:
        found: Listing = {}
        folders = [self.root]
        while folders:
            folder = folders.pop()
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                listing = {e.name: (e.inode(), e.is_dir(follow_symlinks=False)) for e in entries}
                for name, (inode, _) in listing.items():
                    if inode not in self.held:
                        self.held[inode] = os.open(folder / name, os.O_PATH | os.O_NOFOLLOW)
                found[folder.stat().st_ino] = {n: i for n, (i, _) in listing.items()}
                folders += [folder / n for n, (_, is_dir) in listing.items() if is_dir]
        self.folders |= found.keys()
        return found

    def _keep(self, path: Path, inode: int) -> None:
        self.copies += 1
        copy = self.store / str(self.copies)
        shutil.copy2(path, copy)
        self.synced[inode] = copy

    def before(self, call: str) -> None:
        """Note what the disk may hold now."""
        now, root = self._look(), self.root.stat().st_ino
        contents, moment = dict(self.synced), len(self.states) // len(MODELS)
        for model in MODELS:
            names = now if model == "ahead" else {**{i: {} for i in self.folders}, **self.names[model]}
            self.states.append(State(moment, call, model, names, contents, root))

    def sync(self, real: Callable[[int], None], fd: int) -> None:
        """A file's bytes, or a folder's names, go to the disk."""
        path = Path(f"/proc/self/fd/{fd}").readlink()
        with self.lock:
            inside = path.is_relative_to(self.root)
            if inside:
                self.before("fsync")
            real(fd)
            if not inside:
                return
            facts = os.fstat(fd)
            now = self._look()
            self.names["ordered"] = now
            if path.is_dir():
                self.names["strict"][facts.st_ino] = now[facts.st_ino]
            elif path.exists():
                self._keep(path, facts.st_ino)

    @contextlib.contextmanager
    def installed(self) -> Iterator["Shim"]:
        """Watch while the block runs."""
        real = {name: getattr(os, name) for name in (*_WATCHED, "fsync", "fdatasync")}

        def watch(name: str) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                with self.lock:
                    if any(str(a).startswith(str(self.root)) for a in args[:2]) or "dir_fd" in options:
                        self.before(name)
                    return real[name](*args, **options)

            return call

        for name in _WATCHED:
            setattr(os, name, watch(name))
        for name in ("fsync", "fdatasync"):
            setattr(os, name, lambda fd, name=name: self.sync(real[name], fd if isinstance(fd, int) else fd.fileno()))
        try:
            yield self
        finally:
            for name, function in real.items():
                setattr(os, name, function)
            self.before("the end")
            for fd in self.held.values():
                os.close(fd)


def states(root: Path, act: Callable[[], Any]) -> list[State]:
    """What the disk may hold at every moment of `act`, which writes below `root`; equal states once."""
    store = Path(tempfile.mkdtemp(prefix="synced-", dir=root.parent))
    with Shim(root, store).installed() as shim:
        act()
    return list({state.key: state for state in shim.states}.values())


# ---------------------------------------------------------------- the verbs


@dataclass(frozen=True)
class Trial:
    """One verb over an output that was there before, or not.

    Attributes:
        run: (output folder, go on) -> None.
        begin: makes what was there before.
        whole: whether a folder looks complete to its readers.
    """

    run: Callable[[Path, bool], Any]
    begin: Callable[[Path], Any] | None
    whole: Callable[[Path], bool]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but those of a work folder."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {n: p.read_bytes() for n, p in files.items() if not n.startswith((".dsv4-partial", ".dsv4-done"))}


def looks_whole(folder: Path) -> bool:
    """What readers of both formats look for first."""
    return any((folder / n).exists() for n in ("config.json", "latest_checkpointed_iteration.txt"))


def examine(trial: Trial, folder: Path, every: int = 1) -> Counter[str]:
    """Play the trial in `folder` and judge every state that the power could leave."""
    folder.mkdir()
    old: dict[str, bytes] | None = None
    if trial.begin:
        trial.begin(folder / "live/out")
        old = contents(folder / "live/out")
    (folder / "live").mkdir(exist_ok=True)
    found = states(folder / "live", lambda: trial.run(folder / "live/out", False))
    new = contents(folder / "live/out")
    tally: Counter[str] = Counter()
    for number, state in enumerate(found[::every]):
        place = folder / f"state{number}"
        state.make(place)
        out = place / "out"
        there = contents(out) if out.is_dir() else {}
        looks = out.is_dir() and trial.whole(out)
        verdict = "as before" if there == (old or {}) else "new" if there == new else "unfinished"
        if verdict == "unfinished" and looks:
            verdict = f"WRONG ({state.model} at {state.moment}, {state.call}): looks whole, is neither"
        tally[verdict] += 1
        try:
            trial.run(out, True)
            tally["went on to the new bytes" if contents(out) == new else f"LOST ({state.model} {state.moment})"] += 1
        except Exception as error:
            done = there == new and "nothing to resume" in str(error)
            tally["was done already" if done else f"STUCK ({state.model} {state.moment}): {error}"] += 1
        shutil.rmtree(place)
    return tally


def trials(folder: Path) -> dict[str, Trial]:
    """Every verb, on toys."""
    from dsv4_bridge import Options, export_hf, import_hf, make_toy, repack

    a, b = make_toy(folder / "a", "Flash", 1), make_toy(folder / "b", "Flash", 2)
    import_hf(a, folder / "am")
    import_hf(b, folder / "bm")

    def options(go_on: bool) -> Any:
        return Options(resume=go_on, overwrite=True)

    def fresh(go_on: bool) -> Any:
        return Options(resume=go_on)

    return {
        "import": Trial(lambda out, on: import_hf(b, out, fresh(on)), None, looks_whole),
        "import --overwrite": Trial(
            lambda out, on: import_hf(b, out, options(on)), lambda out: import_hf(a, out), looks_whole
        ),
        "export": Trial(lambda out, on: export_hf(folder / "bm", out, b, "source", fresh(on)), None, looks_whole),
        "export --overwrite": Trial(
            lambda out, on: export_hf(folder / "bm", out, b, "source", options(on)),
            lambda out: export_hf(folder / "am", out, a),
            looks_whole,
        ),
        "repack --overwrite": Trial(
            lambda out, on: repack(b, out, "fp8", options(on)), lambda out: repack(a, out, "fp8"), looks_whole
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", help="part of a verb's name; all without it")
    parser.add_argument("--every", type=int, default=1, help="judge one state in so many")
    args = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for verb, trial in trials(folder).items():
            if args.verb and args.verb not in verb:
                continue
            tally = examine(trial, folder / verb.replace(" ", "_"), args.every)
            print(f"{verb}: {sum(tally.values()) // 2} states", dict(sorted(tally.items())), flush=True)
            bad += sum(n for verdict, n in tally.items() if verdict[:4].isupper())
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
