"""The verb `flops`."""

from enum import StrEnum
from typing import Annotated

import typer

from ..errors import BridgeError
from .app import Json, Revision, app, put


class Recompute(StrEnum):
    """What the backward pass computes again."""

    full = "full"
    moe = "moe"


@app.command()
def flops(
    ckpt: str,
    seq_length: Annotated[int | None, typer.Option("--seq-length", min=1, help="Tokens; 4096 by default.")] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Documents of one packed row, as 1024,512,2560.")
    ] = None,
    mtp: Annotated[bool, typer.Option("--mtp/--no-mtp", help="Whether MTP is trained too.")] = True,
    lora_rank: Annotated[int | None, typer.Option("--lora-rank", min=1, help="Train adapters of this rank only.")] = (
        None
    ),
    lora_target: Annotated[
        list[str] | None, typer.Option("--lora-target", help="What carries adapters, as attn.wq_a; may be repeated.")
    ] = None,
    train_indexer: Annotated[bool, typer.Option("--train-indexer", help="Give the indexer gradients.")] = False,
    recompute: Annotated[Recompute | None, typer.Option("--recompute", help="What is computed twice.")] = None,
    loss_chunk: Annotated[
        int | None,
        typer.Option("--loss-chunk", min=0, help="Tokens whose logits are there at a time, 0: all; 2048 by default."),
    ] = None,
    tokens_per_second: Annotated[
        float | None,
        typer.Option("--tokens-per-second", min=0.0, help="Speed of one GPU: TFLOP/s, and MFU with --gpu."),
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Its name, as H100 or B200.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """FLOPs a token, by term, and the published convention's.

    CKPT is a folder of either format, a hub id or a variant's name.
    """
    from ..planning.activations import LOSS_CHUNK
    from ..planning.flops_report import flop_report
    from ..spec.lora import Lora
    from ..store.named import spec_of
    from ..text.tokenizer import parse_ids
    from .show.flops import flop_table

    if seq_length is not None and lengths is not None:
        raise BridgeError("counting FLOPs: --lengths makes a row of its sum; leave --seq-length out")
    if lora_target and lora_rank is None:
        raise BridgeError("counting FLOPs: --lora-target without --lora-rank trains no adapter; give both")
    if tokens_per_second is not None and not tokens_per_second < float("inf"):
        raise BridgeError(f"counting FLOPs: --tokens-per-second is {tokens_per_second}, expected a number")
    lora = None if lora_rank is None else Lora(lora_rank, targets=tuple(lora_target or ()))
    spec = spec_of(ckpt, revision, "counting FLOPs of")
    report = flop_report(
        ckpt,
        spec if mtp else spec.without_draft(),
        parse_ids(lengths) if lengths is not None else [seq_length or 4096],
        packed=lengths is not None,
        lora=lora,
        train_indexer=train_indexer,
        recompute=recompute and recompute.value,
        loss_chunk=LOSS_CHUNK if loss_chunk is None else loss_chunk,
        tokens_per_second=tokens_per_second,
        gpu=gpu,
    )
    put(report.to_json() if as_json else {}, as_json, "" if as_json else flop_table(report))
