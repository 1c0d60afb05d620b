"""FLOPs for people."""

from typing import Any

from ...planning.flops_report import FlopReport


def flop_table(report: FlopReport) -> Any:
    """The table a person reads: GFLOP a token, term by term."""
    from rich.console import Group
    from rich.text import Text

    from .console import make_table

    count, tokens = report.count, report.count.tokens
    forward, backward = count.forward.over(tokens), (count.input_gradients + count.weight_gradients).over(tokens)
    training, theirs = count.training.over(tokens).items(), report.convention.items()
    again = count.recomputed.over(tokens)
    differing = report.differing()
    where = f"{report.seq_length:,} tokens" + (f", {len(report.lengths)} documents" if len(report.lengths) > 1 else "")
    columns = ("term", ">forward", ">backward", ">training", ">published", ">difference", "why")
    tiny = max(sum(training.values()), report.convention.total) < 1e9
    unit = "MFLOP" if tiny else "GFLOP"

    def shown(flops: float, sign: str = "") -> str:
        return f"{flops / (1e6 if tiny else 1e9):{sign}.3f}"

    table = make_table(f"{unit} a token: {report.what}, {where}", *columns)
    for name in training:
        if not training[name] and not theirs[name]:
            continue
        change = shown(training[name] - theirs[name], "+") if name in differing else "="
        row = (forward.items()[name], backward.items()[name], training[name], theirs[name])
        table.add_row(name.replace("_", "-"), *map(shown, row), change, differing.get(name, ""))
    table.add_section()
    totals = (forward.total, backward.total, sum(training.values()), report.convention.total)
    change = shown(totals[2] - totals[3], "+")
    table.add_row("all", *map(shown, totals), change, "")
    lines = [
        f"published convention: {shown(totals[3])} {unit} a token; it leaves out router, hyper-connections (their "
        "Sinkhorn too), hash lookup, adapters and recompute",
    ]
    if report.lora:
        lines.append(f"adapters of rank {report.lora.rank} on {', '.join(report.lora.keys)}; the rest is frozen")
    if again.total:
        more = f"{shown(again.total)} {unit} a token more, executed and not in training"
        lines.append(f"computed again ({', '.join(report.again)}): {more}")
    lines += _speed_lines(report)
    return Group(table, *(Text(line) for line in lines))


def _speed_lines(report: FlopReport) -> list[str]:
    speed = report.speed()
    if not speed:
        return []
    line = f"{report.tokens_per_second:,.0f} tokens/s: {speed['tflops_exact']:,.1f} TFLOP/s, "
    line += f"{speed['tflops_published']:,.1f} in the published convention"
    if "hfu" in speed:
        line += f"; MFU {speed['mfu_exact']:.1%}, published {speed['mfu_published']:.1%}"
        line += f", HFU {speed['hfu']:.1%}" if report.again else ""
        line += f" of {speed['peak_tflops']:,.0f} TFLOP/s ({report.gpu})"
    return [line]
