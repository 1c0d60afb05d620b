"""Torch or Triton: who computes is one setting, and what has no kernel is told."""

from dataclasses import fields, replace

import pytest
import torch
from kernel_tools import DEVICE, TORCH, TRITON

from dsv4_bridge.errors import BridgeError
from dsv4_bridge.mcore import build_model
from dsv4_bridge.mcore.config import EXPERT_LAYOUTS
from dsv4_bridge.mcore.indexer_phase import PHASES
from dsv4_bridge.mcore.kernels.choice import AUTO, KERNELS, Choice, interpreted
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.train.plan import run_of
from dsv4_bridge.train.recipe import Recipe

pytestmark = pytest.mark.megatron


def test_auto_takes_triton_on_a_gpu_alone() -> None:
    narrow, wide = torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE, dtype=torch.float64)
    assert AUTO.fused(narrow, None, torch.zeros(2, dtype=torch.int64)) is (DEVICE == "cuda")
    assert not AUTO.fused(wide)
    assert not TORCH.fused(narrow)
    assert TRITON.fused(narrow)


def test_triton_refuses_what_it_has_no_kernel_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BridgeError, match=r"kernels='triton' computes float32 and bfloat16 .* came to float64 on cpu"):
        TRITON.fused(torch.zeros(2, dtype=torch.float64))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BridgeError, match="came to float32 on cpu; kernels='auto' takes torch there"):
        TRITON.fused(torch.zeros(2))


def test_the_setting_reaches_the_layers() -> None:
    spec = tiny(VARIANTS["Flash"])
    assert build_model(spec, kernels="torch", deterministic_mode=False).config.kernel_choice == Choice("torch")
    with pytest.raises(BridgeError, match="kernels='cuda': expected one of auto, torch, triton"):
        build_model(spec, kernels="cuda")


def test_only_what_is_named_after_triton_or_chooses_it_does() -> None:
    """A choice more is no other name of Triton, neither where it computes nor in the plan of its memory."""
    narrow = torch.zeros(2, device=DEVICE)
    taken = {name for name in KERNELS if Choice(name).fused(narrow)}
    assert taken == ({"auto", "triton"} if DEVICE == "cuda" else {"triton"})
    assert not Choice("another").fused(narrow)
    model = Recipe().model
    planned = {name: run_of(replace(Recipe(), model=replace(model, kernels=name)), 1) for name in (*KERNELS, "another")}
    assert {name for name, run in planned.items() if run.fused} == {"auto", "triton"}


def test_recipes_offer_what_the_model_takes() -> None:
    for field, choices in (
        (("model", "kernels"), KERNELS),
        (("model", "experts"), EXPERT_LAYOUTS),
        (("losses", "indexer"), PHASES),
    ):
        part = next(f for f in fields(Recipe) if f.name == field[0])
        offered = next(f for f in fields(type(getattr(Recipe(), part.name))) if f.name == field[1])
        assert offered.metadata["choices"] == choices, ".".join(field)


@pytest.mark.skipif(not interpreted(), reason="Triton compiles here")
def test_launches_in_the_interpreter_leave_the_language_as_it_was() -> None:
    """`quick_interpreter` makes it the interpreter's own once a launch, behind one that failed as well."""
    import triton.language as tl
    from small_triton import broken, gram

    x = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        assert torch.allclose(gram(x), x @ x.T, atol=1e-4)
        with pytest.raises(Exception, match=r"broadcast|shape"):
            broken(x)
        assert all(tl.core.is_builtin(function) for function in (tl.load, tl.dot, tl.math.exp, tl.tensor.to))
