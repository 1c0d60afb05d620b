"""Every known trap of the model: its check passes, and fails when the mistake is put back."""

import pytest
from bugs import Trap
from checks import warm
from traps import TRAPS

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module", autouse=True)
def models_without_bugs() -> None:
    warm()


def name(trap: Trap) -> str:
    return f"{trap.number} {trap.title}"


@pytest.mark.parametrize("trap", TRAPS, ids=name)
def test_trap(trap: Trap) -> None:
    trap.check()


@pytest.mark.parametrize(("trap", "bug"), [pytest.param(t, b, id=f"{name(t)}: {b}") for t in TRAPS for b in t.bugs])
def test_a_bug_is_seen(trap: Trap, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trap.bugs[bug](monkeypatch)
    with pytest.raises(AssertionError):
        trap.check()


def test_every_trap_of_the_model_is_here() -> None:
    """Those that need several ranks, or concern formats, are tested elsewhere; each of these has a bug."""
    ranks, formats = {6, 27, 55, 59}, set(range(33, 48)) | {49, 52, 53, 54, 61}
    unseen = {23}  # caches in FP8 are the reference's own choice
    assert {t.number for t in TRAPS} == set(range(1, 62)) - ranks - formats - unseen
    assert all(t.bugs for t in TRAPS)
