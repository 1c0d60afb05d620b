"""Starting many processes: the job script, ranks as Slurm numbers them, and the line that a lone process is told."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import dsv4, fresh_dsv4
from dsv4_bridge.ranks import slurm_ranks
from dsv4_bridge.train.choose import choose
from dsv4_bridge.train.recipes import RECIPES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/slurm/dsv4.sh"
# Stand-ins for Slurm and the command: what they were started with.
SRUN = '#!/bin/sh\nprintf "%s\\n" "$SRUN_CPUS_PER_TASK" "$@"\n'
STEP = {"SLURM_STEP_NUM_TASKS": "64", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "node[7-14]"}


def start(tmp_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "5"}
    command = ["bash", str(SCRIPT), *args]
    return subprocess.run(command, capture_output=True, text=True, env=path | env, cwd=tmp_path, check=False)


def test_the_script_hands_words_on_as_they_are(tmp_path: Path) -> None:
    words = ["train", "flash-lora", "out=a folder", "data.train=0.3 a 0.7 b"]
    done = start(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["5", "--kill-on-bad-exit=1", "dsv4", *words]
    assert start(tmp_path).returncode == 2 and "usage: sbatch" in start(tmp_path).stderr


def test_the_script_has_hooks_for_modules_environments_and_containers(tmp_path: Path) -> None:
    (tmp_path / "setup").write_text("export CPUS=11\n")
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").write_text("export SLURM_CPUS_PER_TASK=$CPUS\n")
    env = {"SETUP": str(tmp_path / "setup"), "VENV": "venv", "CONTAINER": "a.sqsh", "MOUNTS": "/d:/d"}
    cpus, _, *inside = start(tmp_path, "doctor", **env).stdout.splitlines()
    image, mounts, folder, *rest = inside
    assert (cpus, image, mounts) == ("11", "--container-image=a.sqsh", "--container-mounts=/d:/d")
    assert folder == f"--container-workdir={tmp_path}" and rest == ["dsv4", "doctor"]


def test_jobs_in_the_docs_have_the_gpus_that_their_recipes_were_planned_for() -> None:
    found = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text().replace("\\\n", " ")
        for options, recipe in re.findall(r"sbatch ([^\n]*)examples/slurm/dsv4\.sh train (\S+)", text):
            (nodes,) = re.findall(r"--nodes=(\d+)", options)
            assert int(nodes) * 8 == choose(recipe).recipe.parallel.gpus, f"{page.name}: {recipe}"
            found.append(recipe)
    assert len(found) >= 3 and set(found) <= set(RECIPES)
    text = SCRIPT.read_text()
    assert "#SBATCH --ntasks-per-node=8\n" in text and "--signal=TERM@" in text and "--requeue" in text


def test_nodes_of_skypilot_start_their_part_of_the_ranks(tmp_path: Path) -> None:
    """Its variables of a node make the line that torchrun wants there."""
    task = yaml.safe_load((ROOT / "examples/skypilot.yaml").read_text())
    words = task["envs"]["WORDS"].split()
    gpus = int(task["resources"]["accelerators"].split(":")[1])
    assert task["num_nodes"] * gpus == choose(words[0]).recipe.parallel.gpus
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    node = {"NUM_NODES": "2", "NODE_RANK": "1", "NUM_GPUS_PER_NODE": "8", "NODE_IPS": "10.0.0.7\n10.0.0.9"}
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **task["envs"]}
    env |= {f"SKYPILOT_{name}": value for name, value in node.items()}
    done = subprocess.run(["bash", "-c", task["run"]], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    options = ["--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "8"]
    options += ["--master-addr", "10.0.0.7", "--master-port", "29500", "-m", "dsv4_bridge", "train"]
    assert done.stdout.splitlines() == options + words


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node[07-09,12],login1", "node07"),
        ("node[3,5-8]", "node3"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]n[03-4].example.org", "rack1n03.example.org"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert slurm_ranks(STEP | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_ranks_are_those_of_a_step() -> None:
    found = slurm_ranks(STEP | {"SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0"})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("9", "64", "1")
    other = slurm_ranks(STEP | {"SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "1"})
    assert 1024 < int(found["MASTER_PORT"]) < 32768 and other["MASTER_PORT"] != found["MASTER_PORT"]
    assert slurm_ranks(STEP | {"MASTER_ADDR": "x", "MASTER_PORT": "1"}).keys() == {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    # a batch script, a step of one task, and what torchrun started inside a step are no such ranks
    job = {"SLURM_NTASKS": "64", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "node[7-14]"}
    for env in (job, STEP | {"SLURM_STEP_NUM_TASKS": "1"}, STEP | {"RANK": "0", "WORLD_SIZE": "2"}, {}):
        assert slurm_ranks(env) == {}


def test_two_tasks_of_slurm_convert_together(toy_flash: Path, tmp_path: Path) -> None:
    """As srun starts them: nothing but Slurm's own variables."""
    step = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": socket.gethostname()}
    code = "from dsv4_bridge.cli import main; main()"
    command = [sys.executable, "-c", code, "import", str(toy_flash), str(tmp_path / "mg"), "--json"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | step
    tasks = [
        subprocess.Popen(command, env=env | {"SLURM_PROCID": str(n)}, stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    said = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert '"verb": "import"' in said[0] and said[1] == ""
    assert dsv4("verify", toy_flash, tmp_path / "mg", "--level", "names").returncode == 0


@pytest.mark.megatron
def test_a_lone_process_is_told_the_line_that_starts_all(toy_flash: Path, tmp_path: Path) -> None:
    words = ["train", "flash-pretrain", f"start={toy_flash}", "data.train=0.5 a 0.5 b", f"out={tmp_path / 'run'}"]
    done = fresh_dsv4(*words, "parallel.pp=1", "parallel.ep=4")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = re.findall(r"Start them: (torchrun .*?); or set", done.stderr)
    assert shlex.split(line)[:5] == ["torchrun", "--nproc-per-node", "4", "-m", "dsv4_bridge"]
    assert shlex.split(line)[5:] == [*words, "parallel.pp=1", "parallel.ep=4"]
    more = fresh_dsv4(*words, "parallel.pp=2", "parallel.ep=8")
    assert "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 --nproc-per-node 8" in more.stderr
