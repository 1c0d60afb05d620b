"""The verb `plan`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BridgeError
from .app import Dtype, Json, Named, Revision, app, finish, put


class Mode(StrEnum):
    """What ranks do."""

    inference = "inference"
    training = "training"
    lora = "lora"


def _size(name: str, text: str) -> Any:
    return typer.Option(f"--{name}", help=text)


@app.command()
def plan(
    ckpt: str,
    naming: Named = None,
    names: Annotated[bool, typer.Option("--names", help="Every released name, a tab, and its Megatron names.")] = False,
    tp: Annotated[int | None, _size("tp", "Tensor-parallel ranks; this and the next plan ranks.")] = None,
    pp: Annotated[int | None, _size("pp", "Pipeline ranks.")] = None,
    ep: Annotated[int | None, _size("ep", "Expert-parallel ranks.")] = None,
    etp: Annotated[int | None, _size("etp", "Expert-tensor-parallel ranks.")] = None,
    dp: Annotated[int | None, _size("dp", "Data-parallel ranks; by default the fewest that work.")] = None,
    cp: Annotated[int | None, _size("cp", "Context-parallel ranks, that rows are cut over.")] = None,
    vp: Annotated[int | None, _size("vp", "Chunks a pipeline rank.")] = None,
    layout: Annotated[str | None, _size("layout", "Pipeline layout, as Et*22|t*21mL; by default solved.")] = None,
    gpus: Annotated[int | None, _size("gpus", "All ranks; alone, ranks layouts of so many.")] = None,
    gpu_memory: Annotated[float | None, _size("gpu-memory", "GiB of a GPU: which layouts fit? Exit code 1 if not")] = (
        None
    ),
    mode: Annotated[Mode | None, _size("mode", "What ranks do; training by default.")] = None,
    dtype: Annotated[Dtype | None, _size("dtype", "Type of the model; bf16 by default.")] = None,
    grad_dtype: Annotated[Dtype | None, _size("grad-dtype", "Type of the gradients' sums; float32 by default.")] = None,
    seq_length: Annotated[int | None, _size("seq-length", "Tokens a row; 4096 by default.")] = None,
    micro_batch: Annotated[int | None, _size("micro-batch", "Rows a micro-batch; 1 by default.")] = None,
    global_batch: Annotated[int | None, _size("global-batch", "Rows a step; by default 4 micro-batches a GPU.")] = None,
    recompute: Annotated[bool | None, typer.Option("--recompute/--no-recompute", help="Full recompute.")] = None,
    distributed_optimizer: Annotated[
        bool | None,
        typer.Option(
            "--distributed-optimizer/--no-distributed-optimizer",
            help="Whether optimizer state is cut over data-parallel ranks; it is by default.",
        ),
    ] = None,
    train_indexer: Annotated[
        bool | None, typer.Option("--train-indexer", help="The indexers learn along with the model.")
    ] = None,
    lora_rank: Annotated[int | None, _size("lora-rank", "Rank of the adapters; 32 by default, as in recipes.")] = None,
    lora_target: Annotated[
        list[str] | None, typer.Option("--lora-target", help="What carries adapters, as attn.wq_a; may be repeated.")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """What goes where: tensors, encodings, bytes on both sides; with sizes, the memory of every rank.

    CKPT is a folder, hub id or variant's name.
    """
    from ..planning.tensors import plan as make_plan
    from ..spec.variants import known_variant

    sizes = {"tp": tp, "pp": pp, "ep": ep, "etp": etp, "dp": dp, "cp": cp, "vp": vp}
    sizes |= {"layout": layout, "gpus": gpus, "gpu_memory": gpu_memory, "global_batch": global_batch}
    run: dict[str, Any] = {"seq_length": seq_length, "micro_batch": micro_batch, "recompute": recompute}
    run |= {"distributed_optimizer": distributed_optimizer, "indexer": train_indexer}
    run |= {"lora_rank": lora_rank, "lora_target": lora_target}
    run |= {k: v and v.value for k, v in {"mode": mode, "dtype": dtype, "grad_dtype": grad_dtype}.items()}
    found: tuple[Any, ...] = (ckpt,)
    if not Path(ckpt).exists() and (revision or known_variant(ckpt) is None) and "/" in ckpt:
        from ..store.hub import describe

        found = describe(ckpt, revision)
    if names:
        from ..planning.tensors import megatron_names_of

        listed = megatron_names_of(found[0], naming=None if naming is None else naming.value)
        put({"names": listed}, as_json, "\n".join(f"{name}\t{' '.join(keys) or '-'}" for name, keys in listed.items()))
        return
    if all(value is None for value in (*sizes.values(), *run.values())):
        from .show.plan import plan_table

        report = make_plan(*found, naming=None if naming is None else naming.value)
        put(report.to_json() if as_json else {}, as_json, "" if as_json else plan_table(report))
        finish(not report.findings)
        return
    _plan_ranks(ckpt, found[0], sizes, {k: v for k, v in run.items() if v is not None}, as_json)


def _plan_ranks(ckpt: str, where: Any, sizes: dict[str, Any], run: dict[str, Any], as_json: bool) -> None:
    from ..planning.memory import Run
    from ..planning.ranks import Asked, plan_ranks
    from ..spec.lora import Lora
    from ..store.named import spec_of
    from .show.plan import ranks_table

    rank, targets = run.pop("lora_rank", None), run.pop("lora_target", None)
    if run.get("mode") != "lora" and (rank or targets):
        word = "--lora-rank" if rank else "--lora-target"
        raise BridgeError(f"planning ranks: {word} without --mode lora changes nothing; give both or neither")
    run["lora"] = Lora(rank or Run().lora.rank, targets=tuple(targets or ()))
    ranks = plan_ranks(ckpt, spec_of(where, doing="planning"), Asked(**sizes, run=Run(**run)))
    put(ranks.to_json() if as_json else {}, as_json, "" if as_json else ranks_table(ranks))
    finish(ranks.fits)
