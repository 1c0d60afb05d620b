"""Torch or Triton: who computes is one setting, and what has no kernel is told."""

import pytest
import torch
from kernel_tools import DEVICE, TORCH, TRITON

from dsv4_bridge.errors import BridgeError
from dsv4_bridge.mcore import build_model
from dsv4_bridge.mcore.kernels.choice import AUTO, Choice, interpreted
from dsv4_bridge.spec.variants import VARIANTS, tiny

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
