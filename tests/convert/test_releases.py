"""`dsv4 verify A --release NAME`: what is proven of a folder, what is not, and every damage named."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import DATA
from dsv4_bridge import BridgeError, make_toy, verify_release
from dsv4_bridge.cli.app import app
from dsv4_bridge.convert.releases import ReleaseReport
from dsv4_bridge.spec.encodings import Stored
from dsv4_bridge.spec.plan import expand, shard_name, shard_of, stored
from dsv4_bridge.spec.releases import RELEASES, Published, Release
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.store.safetensors import INDEX, make_header, make_index

INVENTORIES = ("Flash", "Flash-Base", "Flash-0731", "Pro", "Pro-Base", "Pro-0813")
PUBLISHED = {"Flash": 159617149040, "Flash-0731": 166886535336, "Pro": 864721029744, "Pro-0813": 892744322880}


def facts_of(folder: Path, variant: str) -> Release:
    """A release whose published files are those of a folder: SHA-256 of large ones, Git's blobs of small ones."""

    def known(path: Path, large: bool) -> Published:
        data = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return Published(len(data), f"sha256:{hashlib.sha256(data).hexdigest()}" if large else f"blob:{blob}")

    shards = tuple(known(p, True) for p in sorted(folder.glob("*.safetensors")))
    files = {n: known(folder / n, n == INDEX) for n in ("config.json", INDEX, "generation_config.json")}
    kind = replace(VARIANTS[variant], name="Toy", spec=tiny(VARIANTS[variant]))
    return Release(kind, "0" * 40, files, shards, ordered=False)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("release") / "toy", "Flash", random.randrange(1000))


@pytest.fixture
def toy(sound: Path, tmp_path: Path) -> Path:
    """To be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "toy"))


def test_the_very_bytes(toy: Path) -> None:
    report = verify_release(toy, facts_of(toy, "Flash"), workers=2)
    assert report.same and report.whole and not report.unproven and not report.wrong
    shards = sorted(toy.glob("*.safetensors"))
    assert set(report.proven) == {p.name for p in shards} | {"config.json", INDEX, "generation_config.json"}
    assert report.bytes == sum((toy / n).stat().st_size for n in report.proven)
    assert report.others == ("tokenizer.json", "tokenizer_config.json")
    assert report.tensors is not None and sum(report.tensors.values()) == len(
        json.loads((toy / INDEX).read_text())["weight_map"]
    )


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    path.write_bytes(raw)


DAMAGES: dict[str, tuple[Callable[[Path, str], object], str]] = {
    "bit": (lambda f, n: flip(f / n), "other bytes: (sha256|blob):"),
    "cut": (lambda f, n: (f / n).write_bytes((f / n).read_bytes()[:-1]), "cut short"),
    "longer": (lambda f, n: (f / n).write_bytes((f / n).read_bytes() + b"\0"), "too long"),
    "gone": (lambda f, n: (f / n).unlink(), "^missing$"),
    "unreadable": (lambda f, n: ((f / n).unlink(), (f / n).mkdir()), "published|cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model-00003-of-00009.safetensors", "config.json", INDEX, "generation_config.json"])
def test_every_damage_is_named(damage: str, name: str, toy: Path) -> None:
    facts = facts_of(toy, "Flash")
    harm, what = DAMAGES[damage]
    harm(toy, name)
    report = verify_release(toy, facts)
    assert set(report.wrong) == {name} and not report.same and not report.whole
    assert re.search(what, report.wrong[name]), report.wrong[name]


def test_a_shard_too_many_and_swapped_ones(toy: Path) -> None:
    facts = facts_of(toy, "Flash")
    one, two = (toy / f"model-0000{n}-of-00009.safetensors" for n in (2, 3))
    (toy / "model-extra.safetensors").write_bytes(one.read_bytes())
    one.rename(toy / "x")
    two.rename(one)
    (toy / "x").rename(two)
    assert set(verify_release(toy, facts).wrong) == {one.name, two.name, "model-extra.safetensors"}


def without_digests(facts: Release, *names: str) -> Release:
    files = {n: Published() if n in names else p for n, p in facts.files.items()}
    shards = tuple(Published(p.size) for p in facts.shards) if "shards" in names else facts.shards
    return replace(facts, files=files, shards=shards)


def test_what_is_not_known_is_not_proven(toy: Path) -> None:
    facts = without_digests(facts_of(toy, "Flash"), "config.json", INDEX, "shards")
    report = verify_release(toy, facts)
    assert report.same and not report.whole and set(report.proven) == {"generation_config.json"}
    shards = {p.name for p in toy.glob("*.safetensors")}
    assert set(report.unproven) == shards | {"config.json", INDEX}
    assert all("no digest is known" in what for what in report.unproven.values())
    flip_value(toy / "model-00002-of-00009.safetensors")  # no one could see that; and no one says otherwise
    assert verify_release(toy, facts).unproven == report.unproven


def flip_value(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("variant", ["Flash-Base", "Pro"])
def test_without_digests_another_model_is_seen_by_its_headers(variant: str, toy: Path, tmp_path: Path) -> None:
    other = make_toy(tmp_path / "other", variant, 5)
    facts = without_digests(facts_of(toy, "Flash"), "config.json", INDEX, "generation_config.json", "shards")
    facts = replace(facts, shards=(Published(),) * len(facts.shards))
    report = verify_release(other, facts)
    assert "config.json" in report.wrong and len(report.wrong) > 1
    assert not report.same


def test_without_digests_an_index_of_another_order_is_seen(toy: Path) -> None:
    facts = without_digests(facts_of(toy, "Flash"), INDEX)
    index = json.loads((toy / INDEX).read_text())
    index["weight_map"]["norm.weight"] = "model-00001-of-00009.safetensors"
    (toy / INDEX).write_text(json.dumps(index))
    assert "norm.weight" in verify_release(toy, facts).wrong[INDEX]


@pytest.mark.parametrize("name", INVENTORIES)
def test_the_facts_of_the_releases(name: str, tmp_path: Path) -> None:
    """Tensors by type and the sizes of shards against the reference inventories and published totals."""
    release = RELEASES[name]
    inventory = json.loads((DATA / f"DeepSeek-V4-{name}.tensors.json").read_text())
    shards = [shard_name(n + 1, release.variant.spec) for n in range(len(release.shards))]
    for file in shards[1:]:
        (tmp_path / file).touch()
    config = (DATA / f"DeepSeek-V4-{name}.config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    report = verify_release(tmp_path, name)
    assert report.tensors == dict(sorted(inventory["tensor_count_by_dtype"].items()))
    assert report.wrong[INDEX] == report.wrong[shards[0]] == "missing" and not report.whole
    sizes = [re.search(r"0 bytes, ([\d,]+) are published", report.wrong[file]) for file in shards[1:]]
    told = [int(found[1].replace(",", "")) for found in sizes if found]
    first = 2 * 129280 * release.variant.spec.hidden_size + 96
    assert (first + sum(told) == PUBLISHED[name]) if name in PUBLISHED else not told
    known = release.files["config.json"]
    if known.digest:  # byte-exact copies
        assert known == Published(len(config), f"sha256:{hashlib.sha256(config).hexdigest()}")
        assert report.proven == {"config.json": known.digest} and report.bytes == len(config)
    else:
        assert set(report.unproven) == {"config.json"} and report.bytes == 0


def sparse(folder: Path, name: str) -> None:
    """A release's folder with real headers and holes for values."""
    release = RELEASES[name]
    plan = expand(release.variant.spec, release.variant.own_mtp_head)
    shards: dict[str, list[Stored]] = {}
    for item in plan.items:
        facts = stored(item, release.variant.encodings[item.row.encoding])
        shards.setdefault(shard_name(shard_of(item, plan.spec), plan.spec), []).extend(facts)
    for file, held in shards.items():
        header = make_header(held, {})
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + sum(f.nbytes for f in held))
    (folder / INDEX).write_bytes(make_index({f.name: file for file, held in shards.items() for f in held}, 0))
    (folder / "config.json").write_bytes((DATA / f"DeepSeek-V4-{name}.config.json").read_bytes())


def test_a_folder_of_a_base_by_its_headers_alone(tmp_path: Path) -> None:
    """Nothing differs, and it is not called the release: all of its values are zeros. Then it is damaged."""
    sparse(tmp_path, "Flash-Base")
    told = CliRunner().invoke(app, ["verify", str(tmp_path), "--release", "flash-base", "--json"])
    facts = json.loads(told.stdout)
    assert told.exit_code == 1 and facts["same"] and not facts["whole"]
    assert len(facts["unproven"]) == 48 and not facts["proven"]
    shard, gone = (tmp_path / f"model-0000{n}-of-00046.safetensors" for n in (7, 8))
    with shard.open("rb+") as out:
        out.truncate(shard.stat().st_size - 1)
    gone.unlink()
    told = CliRunner().invoke(app, ["verify", str(tmp_path), "--release", "deepseek-ai/DeepSeek-V4-Flash-Base"])
    shown = " ".join(told.stdout.split())
    assert told.exit_code == 1 and f"{gone.name}: missing" in shown and "truncated" in shown
    assert "not proven: config.json" in shown and "not Flash-Base at 8855555deef2: 2 files differ" in shown


def test_the_launch_config_of_flash_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((DATA / "DeepSeek-V4-Flash.launch-no-expert_dtype.config.json").read_bytes())
    report = verify_release(tmp_path, "Flash")
    assert "launch day" in report.wrong["config.json"]


@pytest.mark.parametrize(
    "args",
    [("--release", "V5"), ("--release", "Flash-FP8"), ("--release", "Flash", "--hub", "a/b"), ("--hub", "no-owner")]
    + [("--release", "Flash", *more) for more in (("--level", "bytes"), ("--revision", "x"), ("--checksums", "x"))],
)
def test_what_cannot_be_asked(args: tuple[str, ...], tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["verify", str(tmp_path), *args])
    assert isinstance(told.exception, BridgeError)
    with pytest.raises(BridgeError, match="not a folder"):
        verify_release(tmp_path / "none", "Flash")


def test_the_report_is_plain(toy: Path) -> None:
    report = verify_release(toy, facts_of(toy, "Flash"))
    assert isinstance(report, ReleaseReport)
    again = json.loads(json.dumps(report.to_json()))
    assert again["whole"] is True and again["release"] == "Toy"
