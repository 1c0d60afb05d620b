"""What fused kernels keep for their backward is what the plan of a GPU's memory counts."""

import pytest
import torch
from rank_memory import Kept

from dsv4_bridge import make_toy
from dsv4_bridge.mcore import build_model
from dsv4_bridge.mcore.adapters.adapters import add_adapters
from dsv4_bridge.parallel.balance import solve
from dsv4_bridge.planning.activations import Shape, chunk_bytes
from dsv4_bridge.spec.lora import Lora
from dsv4_bridge.spec.spec import ModelSpec
from dsv4_bridge.store.hf import open_hf

pytestmark = pytest.mark.megatron
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return open_hf(make_toy(tmp_path_factory.mktemp("memory") / "toy", "Flash", 1)).spec


@pytest.fixture
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only sizes count here: nothing is computed, and what is made holds anything."""
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **more: None)


def kept_and_planned(
    spec: ModelSpec, batch: int, length: int, dtype: str, lora: Lora | None = None
) -> tuple[float, float]:
    """Bytes that autograd keeps behind a forward, and those that the plan has."""
    model = build_model(spec, dtype=DTYPES[dtype], kernels="triton", expert_layout="grouped")
    if lora:
        add_adapters(model, lora)
    kept = Kept([*model.parameters(), *model.buffers()])
    ids = torch.randint(0, spec.vocab_size, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.tensor):
        loss = model.train()(ids, labels=ids.roll(-1, 1)).mean()
    assert loss.requires_grad
    (chunk,) = solve(spec, 1).chunks
    return kept.most, chunk_bytes(spec, chunk, Shape(batch, length, dtype, lora=lora, fused=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are kept from running in the interpreter alone")
@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length"), [(2, 136), (3, 61)])
def test_fused_kernels_keep_what_is_planned(
    spec: ModelSpec, batch: int, length: int, dtype: str, draft: bool, no_kernel_runs: None
) -> None:
    kept, planned = kept_and_planned(spec if draft else spec.without_draft(), batch, length, dtype)
    assert planned == pytest.approx(kept, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are kept from running in the interpreter alone")
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_too(spec: ModelSpec, dtype: str, no_kernel_runs: None) -> None:
    lora = Lora(3, targets=("attn", "ffn.experts"))
    kept, planned = kept_and_planned(spec.without_draft(), 2, 136, dtype, lora)
    assert planned == pytest.approx(kept, rel=0.01)
