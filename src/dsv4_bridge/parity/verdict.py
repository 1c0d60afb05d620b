"""From numbers to a sentence that a person can act on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..spec.plan import Plan
from ..spec.spec import ModelSpec
from .metrics import Choice
from .result import Draft, Narrow, Run, SiteResult, Tolerance, Verdict
from .sites import SITES, draft_suspects, suspects
from .tables import Table

_JUMP = 4.0


@dataclass(frozen=True)
class Found:
    """All that is judged; see `ParityReport`."""

    free: Run
    replayed: Run | None
    tables: tuple[Table, ...] = ()
    narrow: Narrow | None = None
    drafts: tuple[Draft, ...] = ()


def judge(found: Found, tolerance: Tolerance, plan: Plan, unlooked: tuple[str, ...] = ()) -> Verdict:
    """The verdict of one comparison: the first of its parts that differs.

    A run agrees if the free one is within tolerance, or the replayed one is: what is left of the free run's
    difference then comes from near-ties, which rounding decides.

    Args:
        found: what was computed.
        tolerance: what counts as the same.
        plan: of the model, draft blocks among them, for names.
        unlooked: what the tokens did not exercise, in words.
    """
    verdict = _judged(found.free, found.replayed, tolerance, plan)
    wrong = [table for table in found.tables if table.differing]
    if not verdict.passed:
        return replace(verdict, text=f"{verdict.text}. {_rows(wrong)}") if wrong else verdict
    if wrong:
        text = f"the models differ in tables that the sample saw little of: {_rows(wrong)}"
        return Verdict(False, text, wrong[0].layer, wrong[0].site, tuple(table.name for table in wrong))
    said = [verdict.text]
    if found.narrow is not None:
        part = _judged(found.narrow.free, found.narrow.replayed, tolerance, plan)
        how = f"with index_topk {found.narrow.index_topk} in both models instead of {plan.spec.index_topk}"
        if not part.passed:
            return replace(part, text=f"{how}, so that the indexers choose, {part.text}")
        said.append(f"{how} too: {part.text.removeprefix('the models agree').removeprefix(': ').strip()}")
    for draft in found.drafts:
        if not draft.within(tolerance):
            return _blame_draft(draft, tolerance, plan)
    if found.drafts:
        said.append(_drafts(found.drafts, tolerance))
    if found.tables:
        said.append(f"all {max(t.rows for t in found.tables):,} rows of embedding and tables are the same")
    if unlooked:
        said.append(f"Not looked at: {'; '.join(unlooked)}")
    return replace(verdict, text=". ".join(part[:1].upper() + part[1:] if n else part for n, part in enumerate(said)))


def unlooked_at(facts: Mapping[str, Any], spec: ModelSpec, narrow: Narrow | None = None) -> tuple[str, ...]:
    """What the tokens of a comparison did not exercise.

    Args:
        facts: `ids` and `chosen` of `ParityReport.inputs`.
        spec: the model's numbers.
        narrow: the other pass.
    """
    found = []
    if 4 in spec.compress_ratios[: spec.num_hidden_layers] and not facts["chosen"] and narrow is None:
        least = 4 * (spec.index_topk + 1)
        found.append(
            f"the indexers' choice, for no query had more than index_topk {spec.index_topk} blocks "
            f"(--seq-length {least} and more)"
        )
    if facts["ids"] < spec.vocab_size:
        what = "rows of the embedding" + (" and of the hash tables" if spec.num_hash_layers else "")
        found.append(
            f"{spec.vocab_size - facts['ids']:,} of {spec.vocab_size:,} {what} at work (both models hold the same)"
        )
    return tuple(found)


def _rows(wrong: Sequence[Table]) -> str:
    """Which rows are not the same."""
    parts = [
        f"{t.name}: {t.differing:,} of {t.rows:,} {'experts' if t.name.endswith('bias') else 'rows'} differ, the first "
        f"is {t.first:,}"
        for t in wrong[:4]
    ]
    return "; ".join(parts) + (f"; and {len(wrong) - 4} more tables" if len(wrong) > 4 else "")


def _drafts(drafts: Sequence[Draft], tolerance: Tolerance) -> str:
    worst = max(drafts, key=lambda draft: (draft.logits.error, -draft.logits.cosine_min))
    blocks = "the MTP block" if len(drafts) == 1 else f"{len(drafts)} MTP blocks"
    if tolerance.logits is None:
        return f"{blocks} by the formula: cosine {worst.logits.cosine_min:.6f} at the worst position"
    return f"{blocks} by the formula: logits within {worst.logits.error:.2g} of the largest"


def _blame_draft(draft: Draft, tolerance: Tolerance, plan: Plan) -> Verdict:
    run = Run(draft.sites, draft.logits)
    head = f"MTP block {draft.depth} is not what the formula gives: {_logits(run, tolerance)}. "
    index = _first(run, True, tolerance)
    site = "logits" if index is None else draft.sites[index].site
    names = draft_suspects(plan, draft.depth, site)
    if index is None:
        return Verdict(False, f"{head}Its sub-layers are within tolerance. {_look(names)}", None, site, names)
    what = f"First beyond tolerance: {SITES[site].words} ({site}): {_what(draft.sites[index], tolerance)}. "
    return Verdict(False, head + what + _look(names), None, site, names)


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
    if found is None:
        worst = max(site.error for site in run.sites)
        return f"every value of the layers compared within {worst:.2g} of its largest (tolerance {tolerance.site:g})"
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
        jump, found = _JUMP * max(tolerance.site, *(s.error for s in run.sites)), run.logits
        if found is not None and (found.not_finite or found.error > jump):
            names = suspects(plan, None, "logits")
            text = f"Every sub-layer is within tolerance, the logits are not. {_look(names)}"
            return Verdict(False, head + text, None, "logits", names)
        return Verdict(False, head + "No sub-layer stands out: the error grows little by little (see --sites)")
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
