"""Muon: orthogonal updates, of every released matrix by itself, whatever the parameter it lies in."""

import pytest
import torch
from reference import draft_spec

from dsv4_bridge.mcore import build_model
from dsv4_bridge.mcore.optim.muon import Matrix, Muon, matrices_of, newton_schulz
from dsv4_bridge.mcore.weights.places import places

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64), (1, 30)])
def test_newton_schulz_leaves_singular_vectors_and_makes_values_one(shape: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(sum(shape))
    matrix = torch.randn(shape, generator=random) * 3
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = newton_schulz(matrix).double()
    # Singular values within the settling polynomial's reach of 1: the smallest of a square matrix is slow.
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.02
    if shape[0] != shape[1]:
        assert values.min() > 0.98
        assert (found - u @ v).norm() < 0.02 * (u @ v).norm()


def test_newton_schulz_needs_both_kinds_of_step() -> None:
    """Eight fast steps alone leave values between 0.7 and 1.2: the two settling ones bring them to 1."""
    matrix = torch.randn(40, 80, generator=torch.Generator().manual_seed(1))
    fast, both = (torch.linalg.svdvals(newton_schulz(matrix, steps)) for steps in ((8, 0), (8, 2)))
    assert (fast - 1).abs().max() > 0.1
    assert (both - 1).abs().max() < 0.02


def test_step_is_the_reports_formula() -> None:
    random = torch.Generator().manual_seed(7)
    start, gradients = torch.randn(24, 40, generator=random), torch.randn(3, 24, 40, generator=random)
    parameter = torch.nn.Parameter(start.clone())
    muon = Muon([{"params": [parameter]}], [[(Matrix(0, 8), Matrix(8, 24))]], 0.02, 0.1, 0.9, True, 0.18)
    weight, momentum = start.double(), torch.zeros(24, 40, dtype=torch.double)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        muon.step()
        momentum = 0.9 * momentum + gradient.double()
        ahead = 0.9 * momentum + gradient.double()
        update = torch.cat([_exact(ahead[:8]) * 40**0.5, _exact(ahead[8:]) * 40**0.5]) * 0.18
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * update
    assert (parameter.detach().double() - weight).norm() < 0.02 * (weight - start.double()).norm()
    # RMS of an update is 0.18 for any shape, as AdamW's would be.
    assert float(_exact(ahead[8:]).mul(40**0.5 * 0.18).square().mean().sqrt()) == pytest.approx(0.18, rel=1e-6)


def _exact(matrix: torch.Tensor) -> torch.Tensor:
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ v


def test_every_linear_map_is_muons_matrix_by_itself() -> None:
    model = build_model(draft_spec())
    found = matrices_of(model)
    for name, parameter in model.named_parameters():
        rows = sorted((m.start, m.stop) for m in found.get(name, ()))
        vector = parameter.ndim == 1 or name.endswith((".ape", "word_embeddings.weight", "output_layer.weight"))
        assert bool(rows) != vector, name
        if rows:  # they cover the parameter and do not overlap
            assert [start for start, _ in rows] == [0, *(stop for _, stop in rows[:-1])], name
            assert rows[-1][1] == parameter.shape[0], name
    spec = model.spec
    fc1 = next(n for n in found if n.endswith("local_experts.0.linear_fc1.weight"))
    assert len(found[fc1]) == 2  # gate and up
    grouped = next(n for n in found if n.endswith("linear_o_group_proj"))
    assert len(found[grouped]) == spec.o_groups
    assert {m.stop - m.start for m in found[grouped]} == {spec.o_lora_rank}
    assert not any("tid2eid" in n or "expert_bias" in n for n in found)
    assert len(places(model)[1]) > len(found)
