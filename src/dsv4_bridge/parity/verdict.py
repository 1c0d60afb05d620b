"""From numbers to a sentence that a person can act on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..items import Plan
from ..spec import ModelSpec
from .metrics import Choice
from .result import Run, SiteResult, Tolerance, Verdict
from .sites import SITES, suspects

_JUMP = 4.0


def judge(free: Run, replayed: Run | None, tolerance: Tolerance, plan: Plan, unlooked: tuple[str, ...] = ()) -> Verdict:
    """The verdict of one comparison.

    Both models agree if the free run is within tolerance, or the replayed one is: what is left of the
    free run's difference then comes from near-ties, which rounding decides.

    Args:
        free: our model's own choices.
        replayed: with the reference's choices, or None.
        tolerance: what counts as the same.
        plan: of the model, for names.
        unlooked: what the tokens did not exercise, in words.
    """
    verdict = _judged(free, replayed, tolerance, plan)
    if not verdict.passed or not unlooked:
        return verdict
    return replace(verdict, text=f"{verdict.text}. Not looked at: {'; '.join(unlooked)}")


def unlooked_at(facts: Mapping[str, Any], spec: ModelSpec) -> tuple[str, ...]:
    """What the tokens of a comparison did not exercise.

    Args:
        facts: `ids` and `chosen` of `ParityReport.inputs`.
        spec: the model's numbers.
    """
    found = []
    if 4 in spec.compress_ratios[: spec.num_hidden_layers] and not facts["chosen"]:
        least = 4 * (spec.index_topk + 1)
        found.append(
            f"the indexers' choice, for no query had more than index_topk {spec.index_topk} blocks "
            f"(--seq-length {least} and more)"
        )
    if facts["ids"] < spec.vocab_size:
        what = "rows of the embedding" + (" and of the hash tables" if spec.num_hash_layers else "")
        found.append(
            f"{spec.vocab_size - facts['ids']:,} of {spec.vocab_size:,} {what} (`dsv4 verify` compares them all)"
        )
    return tuple(found)


def _judged(free: Run, replayed: Run | None, tolerance: Tolerance, plan: Plan) -> Verdict:
    flips = sum(s.flips for s in free.sites)
    if free.within(tolerance, everywhere=replayed is not None):
        made = sum(s.found.queries for s in free.sites if isinstance(s.found, Choice))
        same = f"every choice is the same, {made:,} sets"
        choices = f"{flips:,} choices went the other way, {_ties(free, tolerance)}" if flips else same
        if replayed is None and tolerance.least_cosine is not None:
            choices += "; other positions are not judged, for choices were not replayed"
        return Verdict(True, f"the models agree: {_logits(free, tolerance)}; {choices}")
    if replayed is not None and replayed.within(tolerance):
        own = sum(s.flips for s in replayed.sites)
        return Verdict(
            True,
            f"the models agree once choices are replayed: {_logits(replayed, tolerance)}. Left to itself our model "
            f"chose otherwise {flips:,} times, differences adding up; on the reference's way {own:,} times, "
            f"{_ties(replayed, tolerance)}, which rounding decides",
        )
    return _blame(replayed or free, replayed is not None, tolerance, plan)


def _ties(run: Run, tolerance: Tolerance) -> str:
    flips, far = (sum(getattr(s, name) for s in run.sites) for name in ("flips", "far"))
    return f"{f'{flips - far:,}' if far else 'all'} of them near-ties (scores within {tolerance.tie:g} of the largest)"


def _logits(run: Run, tolerance: Tolerance) -> str:
    found = run.logits
    if found.not_finite:
        return f"{found.not_finite:,} logits are infinite or NaN"
    if tolerance.logits is not None:
        return (
            f"logits within {found.error:.2g} of the largest (tolerance {tolerance.logits:g}), "
            f"top-1 equal at {100 * found.top1:.6g} % of positions"
        )
    return (
        f"cosine {found.last_cosine:.6f} at the last position (tolerance {tolerance.last_cosine:g}), "
        f"{found.cosine_min:.6f} at the worst ({tolerance.least_cosine:g} with choices replayed)"
    )


def _blame(run: Run, replayed: bool, tolerance: Tolerance, plan: Plan) -> Verdict:
    how = "with the reference's choices replayed" if replayed else "choosing freely"
    head = f"the models differ, {how}: {_logits(run, tolerance)}. "
    index = _first(run, replayed, tolerance)
    if index is None:
        if run.logits.not_finite or run.logits.error > _JUMP * max(tolerance.site, *(s.error for s in run.sites)):
            names = suspects(plan, None, "logits")
            text = f"Every sub-layer is within tolerance, the logits are not. {_look(names)}"
            return Verdict(False, head + text, None, "logits", names)
        return Verdict(False, head + "No sub-layer stands out: the error grows little by little (see --layers)")
    site = run.sites[index]
    names = suspects(plan, site.layer, site.site)
    where = "the model's head" if site.layer is None else f"layer {site.layer}"
    text = f"First beyond tolerance: {where}, {SITES[site.site].words} ({site.site}): {_what(site, tolerance)}. "
    before = next((s for s in reversed(run.sites[:index]) if not SITES[s.site].choices), None)
    if before is not None:
        place = "" if before.layer == site.layer else f" of layer {before.layer}"
        text += f"What comes before it ({before.site}{place}) agrees to {before.error:.2g}. "
    advice = _look(names)
    if isinstance(site.found, Choice) and site.found.flips == site.found.ties:
        advice = "These are near-ties, which rounding decides: run again with --replay to see what is left"
    return Verdict(False, head + text + advice, site.layer, site.site, names)


def _first(run: Run, replayed: bool, tolerance: Tolerance) -> int | None:
    """Where the difference begins.

    The first choice beyond tolerance, or the first error that is beyond it and a jump from all before:
    rounding alone grows little by little. Without a jump, the first error beyond tolerance.
    """
    first, worst = None, tolerance.site / 10
    for index, site in enumerate(run.sites):
        # Without replay even a near-tie is where a difference starts; with it, it has no effect.
        if site.flipped(tolerance) or (not replayed and site.flips):
            return index if first is None else first
        if not site.error <= max(tolerance.site, _JUMP * worst):
            return index
        if first is None and site.error > tolerance.site:
            first = index
        worst = max(worst, site.error)
    return first


def _what(site: SiteResult, tolerance: Tolerance) -> str:
    found = site.found
    if isinstance(found, Choice):
        gap = f"the widest by {found.gap:.2g} of the largest score" if found.gap < float("inf") else "by no score"
        return f"{found.flips:,} of {found.queries:,} sets differ, {found.ties:,} of them near-ties, {gap}"
    if found.not_finite:
        return f"{found.not_finite:,} values are infinite or NaN"
    return (
        f"error {found.error:.2g} of the largest value (tolerance {tolerance.site:g}), "
        f"cosine {found.cosine_min:.6f} at worst"
    )


def _look(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 9} more" if len(names) > 9 else ""
    return f"Tensors that act first there: {', '.join(names[:9])}{more}. `dsv4 verify A B` compares tensors"
