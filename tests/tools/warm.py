"""Python processes that are forked from one that has torch, megatron-core and this package imported.

To import all that takes a fresh interpreter 9 seconds of CPU. What a fresh one does, is tested by those that start it
with `subprocess`.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import warnings
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from disk import do_not_wait

_SERVER = multiprocessing.get_context("forkserver")


def _start_server() -> None:
    """With this folder on its path, and one thread, which a fork needs; later calls find it running."""
    _SERVER.set_forkserver_preload(["warm_imports"])
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


class Warm:
    """As `subprocess.Popen` of a command line of Python: a script, `-m` a module or `-c` code, and its arguments.

    What it says goes to files: a pipe would be held open by those that it starts.

    Attributes:
        pid: the process; with `new_session` also its group.
        out: where its words go; `err` those of stderr.
    """

    def __init__(
        self, *command: object, out: Path, err: Path | None = None, new_session: bool = False, **env: str
    ) -> None:
        self.out, self.err = out, err or out
        _start_server()
        told = ([str(word) for word in command], dict(os.environ | env), out, err, new_session)
        self._process = _SERVER.Process(target=_run, args=told)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"{self.pid} has not ended in {timeout} s"
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self._process.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_world(world: int, *command: object, said: Path, timeout: float, **env: str) -> None:
    """Run a command line of Python as ranks that find one another; all must end well.

    Args:
        world: how many.
        command: as `Warm` takes it.
        said: where each rank's words go, with its number for a suffix.
        timeout: seconds that it may take.
        env: more of the environment.
    """
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)} | env
    outs = [said.with_name(f"{said.name}.rank{rank}.log") for rank in range(world)]
    ends, ranks = time.monotonic() + timeout, []
    try:
        for rank, out in enumerate(outs):
            ranks.append(Warm(*command, out=out, **places, RANK=str(rank), LOCAL_RANK=str(rank)))
        codes = [rank.wait(max(0, ends - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, "\n".join(f"{out}:\n{out.read_text()[-3000:]}" for out in outs)


def _run(command: list[str], env: dict[str, str], out: Path, err: Path | None, new_session: bool) -> None:
    """What a fork does: what `python` with this command line would."""
    gc.freeze()  # what was imported is shared with the others, as long as nobody writes there
    if new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    for stream, path in ((1, out), (2, err)):
        if path is None:
            os.dup2(1, stream)
            continue
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream)
    warnings.simplefilter("ignore")
    do_not_wait()
    kind, *rest = command
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
