"""Two source trees on the same inputs: is every byte that they write the same, and every word that they say?

    python benchmarks/two_trees.py OLD NEW

OLD and NEW are checkouts. Toys of every variant and payload, aligned and ragged, go through import, export, repack,
inspect, verify and plan of both; adapters and data, made once, through merge, lora and data. Printed: each file or
answer that differs, and the counts. Answers are compared as they are, `--json` and `--help` too.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from verbs import PRETRAIN, make_inputs

_VARIANTS = ("Flash", "Flash-Base", "Flash-0731", "Pro", "Pro-Base", "Pro-0813")
_VERBS = "import export repack plan parity generate data train flops recipes demo toy inspect verify lora merge doctor"


def call(tree: Path, place: Path, words: list[str]) -> str:
    """What the command of a tree answers in a folder: exit code, stdout and the last line of stderr."""
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "dsv4_bridge", *words]
    known = dict(os.environ) | {"PYTHONPATH": str(tree / "src"), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=known, capture_output=True, text=True, check=False)
    return f"{done.returncode}\n{done.stdout}\n{done.stderr if done.returncode else ''}"


def commands() -> list[list[str]]:
    """Everything that both trees do, in order, each in the same folder; `../shared` holds what was made once."""
    found = [[verb, "--help"] for verb in _VERBS.split()] + [["--help"]]
    for variant in _VARIANTS:
        found.append(["plan", variant, "--json"])
        for payload in ("natural", "extreme"):
            for ragged in ("", "--ragged"):
                name = f"{variant}-{payload}{ragged}"
                toy = ["toy", f"{name}/hf", "--variant", variant, "--payload", payload, "--seed", "5"]
                found.append([*toy, *([ragged] if ragged else []), "--json"])
                found += [
                    ["import", f"{name}/hf", f"{name}/megatron"],
                    ["export", f"{name}/megatron", f"{name}/back", "--like", f"{name}/hf"],
                    ["export", f"{name}/megatron", f"{name}/bf16", "--encoding", "bf16"],
                    ["export", f"{name}/megatron", f"{name}/fp8", "--encoding", "fp8", "--allow-lossy"],
                    ["repack", f"{name}/hf", f"{name}/repacked", "--encoding", "bf16", "--allow-lossy", "--json"],
                    ["repack", f"{name}/hf", f"{name}/as-fp8", "--encoding", "fp8", "--allow-lossy", "--json"],
                    ["repack", f"{name}/hf", f"{name}/refused", "--encoding", "fp8"],
                    *(["inspect", f"{name}/{what}", "--json"] for what in ("hf", "megatron", "fp8")),
                    *(["verify", f"{name}/hf", f"{name}/{w}", "--json"] for w in ("megatron", "back", "as-fp8")),
                    ["verify", f"{name}/megatron", f"{name}/back", "--level", "bytes", "--json"],
                ]
    shared = "../shared"
    chats = ["--tokenizer", f"{shared}/hf", "--seq-length", "48", "--no-thinking"]
    found += [
        *(["merge", f"{shared}/hf", f"{shared}/adapters", f"merged-{e}", "--encoding", e] for e in ("source", "bf16")),
        ["lora", f"{shared}/adapters", "adapters"],
        ["merge", f"{shared}/hf", "adapters", "merged-peft", "--encoding", "fp8", "--allow-lossy"],
        ["data", f"{shared}/text", "tokens", "--tokenizer", f"{shared}/hf", "--suffix", ".py"],
        ["data", f"{shared}/chats.jsonl", "packs", *chats],
        ["train", "flash-pretrain", *PRETRAIN, f"start={shared}/hf", f"data.train={shared}/tokens", "out=run"],
        ["train", "flash-pretrain", *PRETRAIN, f"start={shared}/hf", "out=nowhere", "--dry-run"],
        *(["flops", variant] for variant in _VARIANTS),
        ["plan", "Flash", "--gpus", "64", "--gpu-memory", "80", "--json"],
    ]
    return found


def digests(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file, but of what says when or how fast."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    kept = [p for p in files if not (p.parts[len(folder.parts)] == "run" and p.suffix != ".distcp")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def main() -> None:
    """Run both trees and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--few", action="store_true", help="one variant")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsv4-trees-") as place:
        root = Path(place)
        (root / "shared").mkdir()
        make_inputs(root / "shared")
        said = differing = 0
        for words in commands():
            if args.few and any(v in words[1] for v in _VARIANTS[1:]):
                continue
            answers = [
                call(tree.resolve(), root / side, words) for side, tree in (("old", args.old), ("new", args.new))
            ]
            said += 1
            if answers[0] != answers[1]:
                differing += 1
                print(f"\ndsv4 {' '.join(words)}", *(f"--- {a[:1500]}" for a in answers), sep="\n", flush=True)
        old, new = (digests(root / side) for side in ("old", "new"))
        wrong = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        for name in wrong:
            print(f"file {name}: {'only old' if name not in new else 'only new' if name not in old else 'other bytes'}")
        print(f"{said} commands, {differing} answers differ; {len(old.keys() | new.keys())} files, {len(wrong)} differ")


if __name__ == "__main__":
    main()
