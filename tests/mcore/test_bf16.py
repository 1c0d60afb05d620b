"""In bfloat16 the model is as close to transformers as the type allows, once choices are the same.

Near-ties in bf16 choose other blocks and experts, in either model: alone that turns a token's
logits. So first everything is chosen; then the reference's choices are replayed.
"""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from reference import Choices, new_folder, record, reference_model, replaying, small_spec, some_ids
from transformers import DeepseekV4ForCausalLM

from dsv4_bridge.mcore import DeepSeekV4Model, build_model, load_weights
from dsv4_bridge.spec.spec import ModelSpec

pytestmark = pytest.mark.megatron

CHOSEN_ALL = small_spec(index_topk=64, num_experts_per_tok=8)
SOME = small_spec()
IDS = {"batch": 2, "length": 200}
# What bf16 checkpoints hold in float32; norms are bf16 on disk although transformers computes in float32.
PRECISE = ("_hc.", "hc_head.", "sinks", "position_bias", "e_score_correction_bias", "tid2eid")


class Trio(NamedTuple):
    """One set of bf16 values: transformers in float32 and in bf16, and ours in bf16."""

    float32: DeepseekV4ForCausalLM
    bf16: DeepseekV4ForCausalLM
    ours: DeepSeekV4Model


@cache
def trio(spec: ModelSpec) -> Trio:
    folder = new_folder()
    float32 = reference_model(spec, folder, seed=2)
    with torch.no_grad():
        for name, tensor in float32.named_parameters():
            if not any(part in name for part in PRECISE):
                tensor.copy_(tensor.bfloat16())
    float32.save_pretrained(folder / "saved")
    bf16 = DeepseekV4ForCausalLM.from_pretrained(folder / "saved", dtype=torch.bfloat16, attn_implementation="eager")
    ours = build_model(spec, dtype=torch.bfloat16, initialize_weights=False)
    load_weights(ours, folder / "saved")  # refuses to round
    return Trio(float32, bf16.eval(), ours.eval())


def cosines(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """[b, s, vocabulary] twice -> [b, s]."""
    return torch.nn.functional.cosine_similarity(ours.float(), theirs.float(), dim=-1)


def logits_with(ours: DeepSeekV4Model, ids: torch.Tensor, choices: Choices) -> torch.Tensor:
    with torch.no_grad(), replaying(choices):
        return ours(ids)


def test_the_types_are_those_of_a_released_checkpoint() -> None:
    models = trio(SOME)
    theirs = models.bf16.model.layers[1]
    assert theirs.self_attn.q_a_proj.weight.dtype is torch.bfloat16
    assert theirs.attn_hc.fn.dtype is torch.float32
    assert models.ours.decoder.layers[1].self_attention.linear_proj.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("against", ["bf16", "float32"])
@pytest.mark.parametrize("spec", [CHOSEN_ALL, SOME], ids=["all chosen", "choices replayed"])
def test_logits_are_close_at_every_position(spec: ModelSpec, against: str) -> None:
    models = trio(spec)
    ids = some_ids(spec, **IDS)
    theirs = record(getattr(models, against), ids)
    ours = logits_with(models.ours, ids, theirs.choices)
    found = cosines(ours, theirs.logits)
    assert found[:, -1].min() >= 0.999
    assert found.mean() >= 0.999
    assert found.min() >= 0.995
