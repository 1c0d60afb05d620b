"""What a machine may lack: a home, a writable package, optional libraries, other ranks, a reader, patience."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from warm import Warm

import dsv4_bridge
from conftest import dsv4, same_files

ROOT = Path(dsv4_bridge.__file__).parents[1]


# What the package has of a library in processes of tests, which have imported both.
AFRESH = """
import sys
for name in [n for n in sys.modules if n.partition(".")[0] in ({name!r}, "dsv4_bridge")]:
    del sys.modules[name]
"""


def run(*args: object, prefix: tuple[str, ...] = (), code: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in an interpreter that has imported nothing."""
    body = f"{code}\nfrom dsv4_bridge.cli import main; main()"
    command = [*prefix, sys.executable, "-W", "ignore", "-c", body, *map(str, args)]
    merged = {k: v for k, v in (os.environ | env).items() if v != "UNSET"}
    return subprocess.run(command, capture_output=True, text=True, env=merged, timeout=120, check=False)


def run_behind(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """The same behind some code, for what a warm interpreter has imported already."""
    return run(*args, code=code)


# ---------------------------------------------------------------- a home


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="becoming another user takes root")
def test_another_user_without_a_home_can_work() -> None:
    """As in a container image whose package only root can write."""
    rights = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    other = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *rights)
    temp = Path(tempfile.mkdtemp())  # not below a folder that is root's alone
    temp.chmod(0o777)
    home = {"HOME": "/nonexistent", "TMPDIR": str(temp), "NUMBA_CACHE_DIR": "UNSET", "NUMBA_OPT": "0"}
    done = run("doctor", temp, "--json", prefix=other, **home)
    assert "Traceback" not in done.stderr and "codec self-test" in done.stdout, done.stderr
    assert [p.name for p in temp.glob("dsv4-bridge-65534")] == ["dsv4-bridge-65534"]
    assert (temp / "dsv4-bridge-65534").stat().st_mode & 0o777 == 0o700
    # A folder of that name that belongs to somebody else is not trusted: what is in it is run.
    shutil.rmtree(temp / "dsv4-bridge-65534")
    (temp / "dsv4-bridge-65534").mkdir(mode=0o777)
    done = run("doctor", temp, "--json", prefix=other, **home)
    assert "Traceback" not in done.stderr and "nowhere" in done.stdout
    assert not list((temp / "dsv4-bridge-65534").iterdir())
    shutil.rmtree(temp)


# ---------------------------------------------------------------- libraries


@pytest.mark.parametrize(
    ("lost", "args", "extra"),
    [
        ("megatron", ("generate", "TOY", "--prompt-ids", "0,1"), "megatron"),
        ("psutil", ("generate", "TOY", "--prompt-ids", "0,1"), "megatron"),
        ("transformers", ("parity", "TOY", "--seq-length", "8"), "hf"),
        ("tokenizers", ("data", "TEXT", "OUT", "--tokenizer", "TOY"), "hf"),
        ("megatron", ("data", "TEXT", "OUT", "--tokenizer", "TOY"), "megatron"),
        ("megatron", ("train", "flash-pretrain", "--tiny", "data.train=x", "out=OUT"), "megatron"),
    ],
)
def test_a_library_that_is_not_there_is_named_with_its_extra(
    lost: str, args: tuple[str, ...], extra: str, toy_flash: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text("some words")
    names = {"TOY": str(toy_flash), "TEXT": str(tmp_path / "t.txt"), "OUT": str(tmp_path / "out")}
    # Megatron-Core takes psutil when it is imported.
    code = AFRESH.format(name="megatron" if lost == "psutil" else lost) + f"sys.modules[{lost!r}] = None"
    done = dsv4(*(names.get(a, a.replace("OUT", names["OUT"])) for a in args), code=code)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-1500:]
    last = done.stderr.strip().splitlines()[-1]
    assert f"dsv4-bridge[{extra}" in last or f",{extra}]" in last


def test_ids_alone_want_no_tokenizers(toy_flash: Path) -> None:
    code = "import sys, importlib.util as u; real = u.find_spec; sys.modules['tokenizers'] = None\n"
    code += "u.find_spec = lambda name, *more: None if name == 'tokenizers' else real(name, *more)"
    done = run_behind(code, "generate", toy_flash, "--prompt-ids", "0,1", "--max-new-tokens", "2")
    assert done.returncode == 0 and len(done.stdout.split()) == 2, done.stderr
    for words in (["--prompt", "hi"], ["--prompt-ids", "0,1", "--stop", "x"]):
        done = run_behind(code, "generate", toy_flash, *words)
        assert done.returncode == 2 and "dsv4-bridge[megatron,hf]" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("error", ["MemoryError()", "ImportError('lib.so: failed to map segment from shared object')"])
def test_no_memory_is_one_message(error: str, toy_flash: Path) -> None:
    code = f"import dsv4_bridge.store.inspect as i\ndef inspect(*_): raise {error}\ni.inspect = inspect"
    done = run_behind(code, "inspect", toy_flash)
    assert done.returncode == 2 and "gives this process no more memory" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_the_doctor_shows_extras_with_their_names(tmp_path: Path) -> None:
    code = AFRESH.format(name="megatron") + "import importlib.metadata as m; real = m.version\n"
    code += "def version(name):\n    if name == 'megatron-core': raise m.PackageNotFoundError(name)\n"
    code += "    return real(name)\n"
    done = dsv4("doctor", tmp_path, code=code + "m.version = version")
    assert "dsv4-bridge[megatron]" in done.stdout.replace("\n", "")


def test_the_doctor_knows_every_package_of_the_extras(tmp_path: Path) -> None:
    """All that a user may install; what is for work on the code aside."""
    extras = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {Requirement(line).name for key in extras for line in extras[key] if key not in ("test", "dev")}
    shown = {check["what"] for check in json.loads(dsv4("doctor", tmp_path, "--json").stdout)["checks"]}
    assert named and not named - shown


# ---------------------------------------------------------------- other ranks


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.megatron
def test_ranks_that_do_not_meet_say_so(toy_flash: Path) -> None:
    from dsv4_bridge import BridgeError
    from dsv4_bridge.mcore.meeting import meet

    def refused(message: str, **env: str) -> None:
        with pytest.raises(BridgeError, match=message):
            meet("gloo", env)

    done = dsv4("generate", toy_flash, "--prompt-ids", "0,1", RANK="0", WORLD_SIZE="2", MASTER_ADDR="", MASTER_PORT="")
    assert done.returncode == 2 and "MASTER_ADDR and MASTER_PORT not set" in done.stderr
    assert "Traceback" not in done.stderr
    there = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "DSV4_RANK_TIMEOUT": "1"}
    refused("ranks 1, 2, 3 did not come within 1 s", RANK="0", MASTER_PORT=str(free_port()), **there)
    refused(r"rank 0 is not to be reached at 127\.0\.0\.1:", RANK="1", MASTER_PORT=str(free_port()), **there)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        message = "that port is in use; choose another MASTER_PORT"
        refused(message, RANK="0", MASTER_PORT=str(taken.getsockname()[1]), **there)
    for name, value in (("RANK", "4"), ("RANK", "x"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "99999")):
        refused(
            f"{name} is '{value}' in the environment", **({"RANK": "0", "MASTER_PORT": "1"} | there | {name: value})
        )


@pytest.mark.megatron
def test_an_interface_that_is_not_there_is_named(toy_flash: Path) -> None:
    """Also a process alone opens a socket, as one in a container without a network."""
    done = dsv4("generate", toy_flash, "--prompt-ids", "0,1", GLOO_SOCKET_IFNAME="dsv4none")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-1500:]
    assert done.stderr.startswith("dsv4: starting one process: torch finds no network interface to use")
    assert done.stderr.endswith("; correct GLOO_SOCKET_IFNAME=dsv4none, or unset it\n")


def test_what_every_rank_meets_is_said_once(tmp_path: Path) -> None:
    """A launcher ends the others when one ends; a rank that meets something alone still says it."""
    command = ("-m", "dsv4_bridge", "train", "flash-petrain")

    def start(rank: int) -> Warm:
        at = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3"}
        return Warm(*command, out=tmp_path / f"rank{rank}", **at)

    first = start(0)
    assert first.wait(60) == 2
    others = [start(rank) for rank in (1, 2)]
    time.sleep(1.5)  # they have met the same by then, and wait for their turn
    for rank in others:
        rank.send_signal(signal.SIGTERM)
    assert {rank.wait(60) for rank in others} <= {2, 143, -signal.SIGTERM}
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(3)]
    assert "flash-petrain" in said[0] and said[0].count("\n") == 1
    assert not any("flash-petrain" in words for words in said[1:]) and "Traceback" not in "".join(said)
    alone = start(2)
    assert alone.wait(60) == 2 and "flash-petrain" in (tmp_path / "rank2").read_text()


# ---------------------------------------------------------------- readers and patience


def test_a_reader_that_has_seen_enough_is_no_failure(toy_flash: Path) -> None:
    command = f'"{sys.executable}" -W ignore -m dsv4_bridge plan "{toy_flash}" | true; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "0" and done.stderr == ""


def test_a_reader_that_has_seen_enough_does_not_hide_a_difference(toy_flash: Path, tmp_path: Path) -> None:
    other = shutil.copytree(toy_flash, tmp_path / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"index_topk": 8', '"index_topk": 16'))
    command = (
        f'"{sys.executable}" -W ignore -m dsv4_bridge verify "{toy_flash}" "{other}" | true; echo "${{PIPESTATUS[0]}}"'
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "1" and done.stderr == ""


SLOW = """
import os, time
real = os.pwrite
def pwrite(*args):
    time.sleep(0.05)
    return real(*args)
os.pwrite = pwrite
"""


SWALLOWED = """
import os, signal, time
from dsv4_bridge import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # below nohup, too
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), {number})
        time.sleep(0.2)
def verb(standalone_mode):
    one = Finalized()
    del one
    time.sleep(60)
cli.app = verb
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_a_finalizer_swallows_ends_the_command(number: signal.Signals, code: int) -> None:
    """Python drops what is raised in `__del__`; libraries free their handles there, at any moment."""
    began = time.monotonic()
    done = run("toy", "x", code=SWALLOWED.format(number=int(number)))
    assert done.returncode == code and time.monotonic() - began < 50
    assert done.stderr.strip() == "dsv4: interrupted; nothing is left half written"


@pytest.mark.parametrize("workers", ["1", "3"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_conversion_that_is_interrupted_says_how_to_go_on(
    number: signal.Signals, code: int, workers: str, toy_flash: Path, toy_megatron: Path, tmp_path: Path
) -> None:
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also below nohup
    body = f"{SLOW}\n{heard}\nfrom dsv4_bridge.cli import main; main()"
    command = ("-c", body, "import", toy_flash, tmp_path / "out", "--workers", workers)
    process = Warm(*command, out=tmp_path / "said", new_session=True)
    journal = tmp_path / "out/.dsv4-partial/journal.jsonl"
    for _ in range(3000):
        if journal.exists() and journal.read_text().count("\n") > 2:
            break
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == code
    said = process.out.read_text()
    assert "interrupted; what is finished is kept" in said and "--resume" in said and "Traceback" not in said
    assert dsv4("import", toy_flash, tmp_path / "out", "--resume").returncode == 0
    assert same_files(tmp_path / "out", toy_megatron) == []


def test_names_cannot_move_the_cursor(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "a\x1b[2Jb\rc")
    assert done.returncode == 2 and "\x1b" not in done.stderr and "\r" not in done.stderr and "\\x1b[2J" in done.stderr


def test_a_removed_folder_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    code = f"import os; os.chdir({str(folder)!r}); os.rmdir({str(folder)!r})"
    done = run("doctor", code=code, PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and "it was removed" in done.stderr and "Traceback" not in done.stderr


def test_memory_that_was_freed_is_given_back() -> None:
    code = """
from dsv4_bridge.free_memory import give_back, held_memory
several, above = [bytes(20_000) for _ in range(10_000)], []
above.append(bytes(20_000))  # behind them: what they leave is no end that the C library gives back by itself
del several
held = held_memory()
give_back()
print(held - held_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100_000_000
