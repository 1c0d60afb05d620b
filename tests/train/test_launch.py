"""The job scripts: each hands the command what it says, to as many ranks as its recipe was planned for."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4_bridge.cli.app import app
from dsv4_bridge.train.choose import choose
from dsv4_bridge.train.recipes import RECIPES

SCRIPTS = sorted((Path(__file__).parents[2] / "examples" / "slurm").glob("*.sh"))
# Stand-ins for Slurm: one rank of many, on the first host.
SRUN = '#!/bin/sh\nshift\nSLURM_PROCID=3 SLURM_LOCALID=3 SLURM_NTASKS=64 exec "$@"\n'
SCONTROL = "#!/bin/sh\necho node7\necho node8\n"
COMMAND = '#!/bin/sh\nprintf "%s\\n" "$RANK" "$WORLD_SIZE" "$MASTER_ADDR" "$@"\n'


def start(script: Path, tmp_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("dsv4", COMMAND)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]"}
    command = ["bash", str(script), *args]
    return subprocess.run(command, capture_output=True, text=True, env=path | env, cwd=tmp_path, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_script_starts_what_it_is_named_after(script: Path, tmp_path: Path) -> None:
    given = {name: f"/data/{name.lower()}1" for name in ("START", "DATA", "OUT", "HF", "MEGATRON", "CKPT")}
    done = start(script, tmp_path, "log.every=5", **given)
    assert done.returncode == 0, done.stderr
    rank, world, leader, verb, *rest = done.stdout.splitlines()
    assert (rank, world) == ("3", "64") and rest[-1] == "log.every=5"
    text = script.read_text()
    nodes, tasks = (int(re.findall(rf"#SBATCH --{n}=(\d+)", text)[0]) for n in ("nodes", "ntasks-per-node"))
    assert f"#SBATCH --job-name={script.stem}\n" in text
    if verb == "train":
        assert leader == "node7" and rest[0] == script.stem and rest[0] in RECIPES
        recipe = choose(rest[0], rest[1:]).recipe
        assert nodes * tasks == recipe.parallel.gpus
        assert (recipe.start, recipe.data.train, recipe.out) == ("/data/start1", ("/data/data1",), "/data/out1")
        assert "--signal=TERM@" in text and "--requeue" in text
    else:
        assert verb == script.stem
        options = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"}).output
        assert [o for o in rest if o.startswith("--") and o not in options] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_script_says_what_is_missing(script: Path, tmp_path: Path) -> None:
    done = start(script, tmp_path)
    assert done.returncode != 0
    assert re.search(r": (DATA|HF|MEGATRON|CKPT): ", done.stderr), done.stderr
