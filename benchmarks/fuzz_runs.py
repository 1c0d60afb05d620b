"""Loaders of what runs leave: journals, rank files, locks, progress; see `fuzz`."""

import contextlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv4_bridge import BridgeError
from mutations import Raw, mutate_json, to_json


class Journals:
    """What a conversion that was stopped has left of itself."""

    def __init__(self, folder: Path, seed: int):
        from dsv4_bridge.codec import Certificate, EncodeStats
        from dsv4_bridge.convert import journal
        from dsv4_bridge.convert.emitter import Report

        self._folder, self._seed = folder, seed
        report = Report(3, 99, {"a": EncodeStats(4, 1, 3)}, {"b": Certificate(4, 4)}, {"c": 5}, 1)
        (folder / "x").write_bytes(b"x" * 9)
        journal.begin(folder, "0" * 64, "import")
        journal.enter(folder, 0, "x", folder / "x", 7, report.to_json())
        journal.enter(folder, 1, "y", folder / "x", 7, report.to_json())
        journal.place(folder)
        self._sound = {path.name: path.read_bytes() for path in folder.glob("journal*")}

    def run(self, number: int) -> None:
        from dsv4_bridge.convert import journal
        from dsv4_bridge.convert.emitter import Report

        rng = random.Random(f"{self._seed} {number}")
        for name, data in self._sound.items():
            lines = data.splitlines()
            for at in rng.sample(range(len(lines)), min(len(lines), rng.choice((0, 1, 1, 3)))):
                lines[at] = mutate_json(lines[at], rng)
            (self._folder / name).write_bytes(b"\n".join(lines))
        header, total = journal.header(self._folder), Report()
        if header is not None:
            assert isinstance(header["identity"], str) and isinstance(header["label"], str)
        for line in journal.lines(self._folder):
            with contextlib.suppress(ValueError):  # a name with a zero byte is of no file
                journal.is_of(line, self._folder / "x")
            total.merge(Report.from_json(line["report"]))
        json.dumps(total.to_json())
        journal.placing(self._folder)
        if header is None:
            raise BridgeError("no journal")


class RankFiles:
    """What processes that share a conversion say of themselves: others' files while this one joins, and locks."""

    def __init__(self, folder: Path, seed: int):
        from dsv4_bridge import ranks
        from dsv4_bridge.convert import team

        ranks._STALE, ranks.BEAT, team._PARTING = 0.05, 0.01, 0.05  # type: ignore[misc]
        self._folder, self._seed = folder, seed
        (folder / "kept").touch()  # folders that are empty go at the end of a run

    def run(self, number: int) -> None:
        from dsv4_bridge import lock, ranks
        from dsv4_bridge.convert.emitter import Report
        from dsv4_bridge.convert.team import Team

        rng = random.Random(f"{self._seed} {number}")
        state = rng.choice(("joining", "working", "done", "finished", "failed", "holding"))
        more = {
            "members": {"1": "w"},
            "shares": [["a"], ["b"]],
            "result": Report(1, 2).to_json(),
            "made": ["/nowhere/x"],
        }
        entry = ranks.introduction(rng.randrange(2), state, {"a": "b"}) | more
        entry |= {"error": "e", "told": False, "discard": False, "session": rng.choice(("", "s"))}
        if rng.random() < 0.7:
            entry["pid"] = 1 << 22  # nobody
        raw = mutate_json(json.dumps(entry).encode(), rng)
        if rng.random() < 0.4:
            out = self._folder / "out"
            lock.lock_path(out).write_bytes(raw)
            with lock.hold(out, "writing"):
                return
        work = self._folder / f"out{number}" / "work" / "ranks"
        work.mkdir(parents=True)
        (work / f"{entry['rank']}.json").write_bytes(raw)
        if found := ranks.read(work / f"{entry['rank']}.json"):
            ranks.who(found)
            if "result" in found:
                Report.from_json(found["result"])
        team = Team(work, ranks.Ranks(1 - entry["rank"], 2, 0.05), {"a": "b"}, "import")
        try:
            team.claim()
            try:
                team.meet()
            except BaseException as error:
                team.fail(error, discard=False)
                raise
        finally:
            team.close()


class Progress:
    """How far a training run was, beside its checkpoint; and its log."""

    def __init__(self, folder: Path, seed: int):
        self._path, self._seed = folder / "training.json", seed

    def run(self, number: int) -> None:
        from dsv4_bridge.train.log import Teller
        from dsv4_bridge.train.resume import _progress

        rng = random.Random(f"{self._seed} {number}")
        sound = {"step": 3, "rows": 12, "tokens": 4096}
        raw = json.dumps(sound).encode()
        values: list[Any] = [
            True,
            4.5,
            -1,
            1 << 63,
            "3",
            None,
            [],
            Raw("1" * 5000),
            Raw("NaN"),
            Raw("1e400"),
            Raw('1,"step":2'),
        ]
        if rng.random() < 0.5:
            raw = to_json(sound | {rng.choice([*sound, "x"]): rng.choice(values)}, rng)
        else:
            raw = mutate_json(raw, rng)
        self._path.write_bytes(raw)
        lines = [mutate_json(b'{"step": 3, "loss": 1.5}', rng) for _ in range(3)]
        (self._path.parent / "log.jsonl").write_bytes(b"\n".join(lines))
        Teller(self._path.parent, 1, 1, lambda line: None, 2).close()
        state = _progress(self._path, "resuming")
        assert all(type(n) is int and 0 <= n < 1 << 63 for n in vars(replace(state)).values())
