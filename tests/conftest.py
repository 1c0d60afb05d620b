"""Shared fixtures: reference data, toy checkpoints, the command in this process or another."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Two test processes share two cores: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not shutil.which("nvidia-smi"):  # Triton's kernels run in its interpreter; it looks when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

DATA = Path(__file__).parent / "files"


# Files of many seconds. Shared out among processes, they come first: one that came last would have the others wait.
LONG = (
    "train/test_training_ranks.py",
    "train/test_training.py",
    "train/test_train_command.py",
    "mcore/test_attention_triton.py",
    "parity/test_parity_whole.py",
    "convert/test_transformers.py",
    "convert/test_ranks.py",
    "test_surroundings.py",
    "store/test_hub.py",
    "parity/test_streamed.py",
    "mcore/test_experts.py",
    "mcore/test_context_parallel.py",
    "convert/test_rename.py",
    "test_terminal.py",
    "store/test_neighbours.py",
    "data/test_data_kinds.py",
    "convert/test_roundtrip.py",
    "test_benchmarks_gpu.py",
    "train/test_stopping.py",
    "parity/test_parity.py",
    "test_fuzz.py",
    "mcore/test_indexer_loss_triton.py",
    "mcore/test_generate.py",
    "mcore/test_weights.py",
    "generate/test_generate_command.py",
    "convert/test_contents.py",
    "convert/test_surviving.py",
    "convert/test_power_loss.py",
    "mcore/test_every_gradient.py",
    "mcore/test_forward.py",
    "lora/test_lora_of_peft.py",
    "mcore/test_on_device.py",
    "train/test_after_training.py",
    "test_docs.py",
    "mcore/test_indexer_loss.py",
    "convert/test_served.py",
    "convert/test_releases.py",
    "mcore/test_index_triton.py",
    "mcore/test_streams_triton.py",
    "mcore/test_gradients.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first among processes; tests that need a CUDA device left out where there is none."""
    if hasattr(config, "workerinput"):
        places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: places.get(item.path, len(LONG)))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("gpu")])
        items[:] = [i for i in items if not i.get_closest_marker("gpu")]


def pytest_configure() -> None:
    from disk import do_not_wait

    do_not_wait()
    gc.set_threshold(200_000, 20, 100)  # as the command does: the objects of tests are many, and few are cycles


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain of what is left of them at the end


def of_release(name: str, kind: str) -> Path:
    """Reference data of a variant, by its short name."""
    return DATA / f"DeepSeek-{name if name.startswith('V4.1') else f'V4-{name}'}.{kind}.json"


def config_path(name: str) -> Path:
    return of_release(name, "config")


def inventory(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a released variant: name -> (dtype, shape)."""
    expanded = {}
    for entry in json.loads(of_release(name, "tensors").read_text())["tensors"]:
        for layer in entry.get("layers", [None]):
            for expert in range(entry["experts"]) if "experts" in entry else [None]:
                expanded[entry["name"].format(layer=layer, expert=expert)] = (entry["dtype"], tuple(entry["shape"]))
    return expanded


def same_files(a: Path, b: Path) -> list[str]:
    """Relative names of the files that are not byte-identical in both folders."""
    names = {str(p.relative_to(f)) for f in (a, b) for p in f.rglob("*") if p.is_file()}
    return sorted(
        n
        for n in names
        if not ((a / n).is_file() and (b / n).is_file()) or (a / n).read_bytes() != (b / n).read_bytes()
    )


def dsv4(*args: str | Path, code: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command, behind some code, in its own process, which need not import what it takes."""
    from warm import Warm

    body = f"{code}\nfrom dsv4_bridge.cli import main; main()"
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = Warm("-c", body, *args, out=out, err=err, **env)
        try:
            code = process.wait(timeout=300)
        finally:
            process.kill()
        return subprocess.CompletedProcess(args, code, out.read_text(), err.read_text())


def fresh_dsv4(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in an interpreter that has imported nothing, as users do."""
    command = [sys.executable, "-c", "from dsv4_bridge.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=300, check=False)


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> None:
    """What was imported or made before a module stays: collections need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def toy_flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dsv4_bridge import make_toy

    return make_toy(tmp_path_factory.mktemp("toy") / "flash", "Flash", 7)


@pytest.fixture(scope="session")
def toy_megatron(toy_flash: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dsv4_bridge import import_hf

    out = tmp_path_factory.mktemp("toy") / "megatron"
    import_hf(toy_flash, out)
    return out
