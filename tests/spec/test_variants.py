"""What a checkpoint is called: by its own numbers, never by those of a release that is only stored alike."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4_bridge import inspect, make_toy, plan
from dsv4_bridge.spec.releases import RELEASES
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS, Variant, recognise
from dsv4_bridge.store.hf_config import released_config


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch) -> Variant:
    """One release more, in front of the others: Flash's widths and encodings, another depth."""
    flash = VARIANTS["Flash"]
    spec = replace_spec(flash.spec, num_hidden_layers=21, compress_ratios=(0, 0, *(4, 128) * 9, 4, 0))
    made = replace(flash, name="Mini", hub_id="", spec=spec)
    others = dict(VARIANTS)
    for name in others:
        monkeypatch.delitem(VARIANTS, name)
    for variant in (made, *others.values()):
        monkeypatch.setitem(VARIANTS, variant.name, variant)
    return made


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_recognised(name: str) -> None:
    variant = VARIANTS[name]
    assert recognise(variant.spec, variant.encodings, variant.own_mtp_head) == name


def test_one_variant_more_takes_no_other_s_name(mini: Variant, tmp_path: Path) -> None:
    for variant in VARIANTS.values():
        assert recognise(variant.spec, variant.encodings, variant.own_mtp_head) == variant.name
    assert inspect(make_toy(tmp_path / "toy", "Flash")).variant.startswith("custom (other size, stored like ")


@pytest.mark.parametrize("name", ["Mini", "Flash", "Flash-Base", "Flash-0731", "Flash-BF16", "Pro", "Pro-0813"])
def test_a_config_alone_points_to_its_own_numbers(name: str, mini: Variant, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    config = released_config(variant.spec, variant.expert_dtype, quantized="BF16" not in name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan(tmp_path).variant == f"{name} by config.json"


def test_what_is_known_of_files_is_known_of_every_release() -> None:
    published = [v.name for v in VARIANTS.values() if v.hub_id.startswith("deepseek-ai/")]
    assert list(RELEASES) == published
