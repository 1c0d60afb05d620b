"""The verbs `recipes`, `train` and `report`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BridgeError, printable
from .app import Json, app, finish, put, quiet


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe, or its YAML file.")] = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print NAME as a YAML file that `train` takes.")] = False,
    as_json: Json = False,
) -> None:
    """Training recipes; with NAME, every value of one and where it comes from."""
    from ..train.choose import choose, dump, values
    from ..train.recipes import RECIPES
    from .show.console import make_table

    if name is None:
        if as_yaml:
            raise BridgeError("printing a recipe as YAML: name one, as `dsv4 recipes flash-lora --yaml`")
        table = make_table("", "recipe", "what", box=None)
        for known, (summary, _) in RECIPES.items():
            table.add_row(known, summary)
        put({"recipes": {known: summary for known, (summary, _) in RECIPES.items()}}, as_json, table)
        return
    chosen = choose(name)
    if as_yaml:
        sys.stdout.write(dump(chosen.recipe))
        return
    table = make_table("", "key", "value", "where it comes from", box=None)
    facts = {}
    for key, value in values(chosen.recipe).items():
        table.add_row(key, _shown(value), chosen.sources[key])
        facts[key] = {"value": value, "source": chosen.sources[key]}
    put({"recipe": chosen.recipe.name, "values": facts}, as_json, table)


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="A recipe, or its YAML file.")],
    changes: Annotated[list[str] | None, typer.Argument(help="key=value, as optimizer.lr=1e-5 out=runs/1.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the memory of every rank; start nothing.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Two steps of the same on a tiny model, one rank.")] = False,
    gpu_memory: Annotated[float | None, typer.Option("--gpu-memory", help="With --dry-run: GiB of a GPU.")] = None,
    as_json: Json = False,
) -> None:
    """Train by a recipe; where `out` has a checkpoint, go on from there.

    Started by torchrun, every process is a rank. Data comes from `dsv4 data`.
    """
    from ..ranks import Ranks
    from ..train.choose import as_plain, choose
    from ..train.plan import plan_recipe, recipe_spec, scaled_down

    chosen = choose(name, changes or ())
    recipe = scaled_down(chosen.recipe, changes or ()) if tiny else chosen.recipe
    spec = recipe_spec(recipe, tiny)
    if gpu_memory is not None and not dry_run:
        raise BridgeError("training: --gpu-memory is of a plan, and changes no run; say --dry-run with it")
    if dry_run:
        from .show.plan import ranks_table

        report = plan_recipe(recipe, spec, gpu_memory)
        put({"recipe": as_plain(recipe), "plan": report.to_json()}, as_json, ranks_table(report))
        finish(report.fits)
        return
    from .show.lines import columns, folded

    ranks = Ranks.from_environment()

    def say(line: str) -> None:
        if not quiet():  # where stdout is for a program, lines go where other verbs show their progress
            typer.echo(folded(printable(line), None if as_json else columns()), err=as_json)

    from .. import mcore  # noqa: F401 - prepares torch for megatron-core
    from ..train.loop import train as run_train

    outcome = run_train(recipe, spec, ranks.world, say)
    if ranks.rank:
        return
    facts = {
        "recipe": recipe.name,
        "step": outcome.state.step,
        "tokens": outcome.state.tokens,
        "loss": outcome.losses[-1] if outcome.losses else None,
        "stopped": outcome.stopped,
        "checkpoint": str(outcome.checkpoint) if outcome.checkpoint else None,
    }
    put(facts, as_json, f"step {outcome.state.step}: checkpoint {outcome.checkpoint}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument()],
    out: Annotated[Path | None, typer.Argument()] = None,
    as_json: Json = False,
) -> None:
    """A run as one HTML file: curves, recipe with its sources, commands to go on; also while it is under way."""
    from ..train.report import read_run, write_run_report

    found = read_run(run)
    path = write_run_report(found, out)
    put(found.to_json() | {"page": str(path)}, as_json, f"{path}: step {found.step} of {found.recipe.schedule.steps}")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
