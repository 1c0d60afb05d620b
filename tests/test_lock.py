"""One writer an output: who holds it is told, and a dead holder holds nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv4_bridge.errors import BridgeError
from dsv4_bridge.lock import hold, lock_path

HOLDER = """
import sys, time
from pathlib import Path
from dsv4_bridge.lock import hold
with hold(Path(sys.argv[1]), "writing"):
    print("held", flush=True)
    time.sleep(60)
"""
RACER = """
import sys, time
from pathlib import Path
from dsv4_bridge.errors import BridgeError
from dsv4_bridge.lock import hold
time.sleep(max(0, float(sys.argv[2]) - 0.05 - time.time()))
while time.time() < float(sys.argv[2]):
    pass
try:
    with hold(Path(sys.argv[1]), "writing"):
        with open(sys.argv[1] + ".log", "a") as f: f.write("in\\n"); f.flush(); time.sleep(1.0); f.write("out\\n")
except BridgeError as error:
    sys.exit(2)
"""


def test_a_holder_is_named_and_a_dead_one_is_nobody(tmp_path: Path) -> None:
    out = tmp_path / "some" / "out"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    with pytest.raises(BridgeError, match=rf"another run is writing .*out, process {process.pid} on "), hold(out, "x"):
        pass
    process.kill()
    process.wait()
    assert lock_path(out).exists()
    with hold(out, "x"), pytest.raises(BridgeError, match=f"process {os.getpid()}"), hold(out, "y"):
        pass
    assert list((tmp_path / "some").iterdir()) == []


def test_links_to_one_place_are_one_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with hold(tmp_path / "real" / "x", "x"), pytest.raises(BridgeError), hold(tmp_path / "link" / "x", "x"):
        pass


def test_starts_at_one_moment_behind_a_dead_holder(tmp_path: Path) -> None:
    for attempt in range(3):
        out = tmp_path / f"out{attempt}"
        dead = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
        assert dead.stdout and dead.stdout.readline()
        dead.kill()
        dead.wait()
        arguments = [sys.executable, "-c", RACER, str(out), str(time.time() + 1.5)]
        racers = [subprocess.Popen(arguments) for _ in range(4)]
        assert sorted(r.wait() for r in racers) == [0, 2, 2, 2]
        assert Path(f"{out}.log").read_text() == "in\nout\n"


def test_an_unwritable_parent_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BridgeError, match="cannot be written"), hold(tmp_path / "file" / "out", "writing"):
        pass
