"""Whatever differs, some tensor is named: a new row of the table is not forgotten here."""

from dsv4_bridge.parity.sites import SITES, draft_suspects, suspects
from dsv4_bridge.spec.plan import expand
from dsv4_bridge.spec.variants import VARIANTS, tiny


def test_every_tensor_acts_first_at_some_site() -> None:
    plan = expand(tiny(VARIANTS["Flash"]))
    named = {
        name
        for layer in (*range(plan.spec.num_hidden_layers), None)
        for s in SITES
        for name in suspects(plan, layer, s)
    }
    named |= {name for s in SITES for name in draft_suspects(plan, 0, s)}
    for item in plan.items:
        shown = item.name if item.expert is None else item.name.replace(f".experts.{item.expert}.", ".experts.*.")
        assert shown in named, item.row.key
