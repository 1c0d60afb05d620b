"""The model computes what transformers computes."""

from pathlib import Path

import pytest
import torch
from reference import our_model, reference_model, small_spec

pytestmark = pytest.mark.megatron


def test_logits_equal_transformers(tmp_path: Path) -> None:
    spec = small_spec()
    reference = reference_model(spec, tmp_path)
    model = our_model(reference, spec, tmp_path)
    ids = torch.randint(0, spec.vocab_size, (3, 301), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours = reference(ids).logits, model(ids)
    assert (theirs - ours).abs().max() <= 1e-5 * theirs.abs().max()
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
