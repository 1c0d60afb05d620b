"""What `--help` says beside a verb's own options: a short line, its arguments, an example, options of every verb."""

import copy
from typing import Any, NamedTuple

import typer.core

_ANY = "Folder of either format, Megatron iteration, or hub id as owner/name."
_HF = "Folder in the released format, or hub id as owner/name."
_MEGATRON = "Megatron checkpoint: its root or an iteration folder."
_OUT = "New folder; it must not hold anything else."


class Help(NamedTuple):
    """Of one verb.

    Attributes:
        short: its line in the list of verbs, at most 60 characters.
        example: a command that works as it stands where its folders are there.
        arguments: what each is, by name.
    """

    short: str
    example: str
    arguments: dict[str, str] = {}  # noqa: RUF012 - never changed


_FLASH = "deepseek-ai/DeepSeek-V4-Flash"
VERBS = {
    "demo": Help("The whole story on a tiny checkpoint.", "dsv4 demo --keep demo"),
    "toy": Help("Make a small random checkpoint.", "dsv4 toy toy --variant Pro --seed 7", {"dst": _OUT}),
    "inspect": Help(
        "What is this: variant, encodings, what is missing?",
        f"dsv4 inspect {_FLASH}",
        {"ckpt": _ANY},
    ),
    "plan": Help(
        "What goes where, how large, and does it fit?",
        "dsv4 plan Flash --gpus 256 --gpu-memory 80 --recompute",
        {"ckpt": "Folder, hub id, or a variant's name, as Flash."},
    ),
    "import": Help(
        "Released format -> Megatron checkpoint.",
        f"dsv4 import {_FLASH} flash-megatron --workers 2",
        {"hf": _HF, "out": _OUT},
    ),
    "export": Help(
        "Megatron checkpoint -> released format.",
        f"dsv4 export flash-megatron flash-back --like {_FLASH}",
        {"megatron": _MEGATRON, "out": _OUT},
    ),
    "rename": Help(
        "Megatron checkpoint -> names of the other model.",
        "dsv4 rename flash-megatron flash-hybrid --naming hybrid",
        {"megatron": _MEGATRON, "out": _OUT},
    ),
    "repack": Help(
        "Re-encode a release as FP8 or BF16.",
        f"dsv4 repack {_FLASH} flash-fp8 --encoding fp8",
        {"hf": _HF, "out": _OUT},
    ),
    "verify": Help(
        "Are two checkpoints the same, or files as written?",
        f"dsv4 verify {_FLASH} flash-back --level bytes",
        {"a": _ANY},
    ),
    "generate": Help(
        "Continue prompts, on the CPU or a GPU.",
        'dsv4 generate flash-megatron --prompt "Once upon a time" --stream --memory 16',
        {"ckpt": _ANY},
    ),
    "parity": Help(
        "Does it compute what transformers computes?",
        "dsv4 parity flash-megatron --report parity",
        {"ckpt": _ANY},
    ),
    "data": Help(
        "Text or chats -> training data.",
        f"dsv4 data chats.jsonl chat --tokenizer {_FLASH} --seq-length 4096 --thinking auto",
    ),
    "recipes": Help("Training recipes, and every value of one.", "dsv4 recipes flash-lora --yaml > my.yaml"),
    "train": Help(
        "Train by a recipe, or go on where it stopped.",
        "dsv4 train flash-pretrain --tiny data.train=text tokenizer=toy out=run",
    ),
    "report": Help(
        "A run as one page for a browser.",
        "dsv4 report run run.html",
        {"run": "Folder of a run: out= of `dsv4 train`.", "out": "HTML file; default report.html in the run's folder."},
    ),
    "lora": Help(
        "Adapters of a run -> folder for peft.",
        "dsv4 lora run adapter",
        {"megatron": "Training checkpoint of adapters: a run's folder or an iteration's.", "out": _OUT},
    ),
    "merge": Help(
        "Release + adapters -> release.",
        f"dsv4 merge {_FLASH} adapter flash-merged",
        {"hf": _HF, "adapter": "Folder of adapters, peft's or a run's.", "out": _OUT},
    ),
    "push": Help(
        "Checkpoint or adapters -> the Hub, with a card.",
        "dsv4 push flash-back my-name/flash-back --dry-run",
        {
            "folder": "A finished checkpoint of either format, or adapters.",
            "repo": "Repository on the Hub, owner/name.",
        },
    ),
    "flops": Help(
        "FLOPs a token, by term.",
        "dsv4 flops Flash --seq-length 65536",
        {"ckpt": "Folder, hub id, or a variant's name, as Flash."},
    ),
    "doctor": Help("Can this machine do the work?", "dsv4 doctor /data", {"folder": "Where outputs would go."}),
}


ANYWHERE = ("hushed", "version")  # options that stand before a verb or behind it


class Verbs(typer.core.TyperGroup):
    """The verbs, with these words."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command: Any = super().get_command(ctx, cmd_name)
        found = VERBS.get(cmd_name)
        if command is not None and found is not None:
            command.short_help, command.epilog = found.short, f"Example: {found.example}"
            for parameter in command.params:
                if parameter.name in found.arguments and getattr(parameter, "help", None) is None:
                    parameter.help = found.arguments[parameter.name]
        if command is not None and not any(parameter.name in ANYWHERE for parameter in command.params):
            command.params += [_behind(parameter) for parameter in self.params if parameter.name in ANYWHERE]
        return command


def _behind(option: Any) -> Any:
    """An option of the command as one of a verb, whose function is not told of it."""
    one = copy.copy(option)
    one.expose_value = False
    return one
