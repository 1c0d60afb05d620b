"""Recipes from YAML: a file that leaves things out is the recipe that it names, and nothing in one is a traceback."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import dsv4
from dsv4_bridge import BridgeError
from dsv4_bridge.train.choose import choose, dump, load, values
from dsv4_bridge.train.recipes import RECIPES
from mutations import mutate_yaml


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("how", ["base: {}\n", "name: {}\n", "name: mine\nbase: {}\n"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_a_file_leaves_out_is_the_recipes(name: str, how: str, tmp_path: Path) -> None:
    chosen = load(written(tmp_path / "my.yaml", how.format(name) + "optimizer: {lr: 1.5e-4}\n"))
    expected = values(choose(name).recipe) | {"optimizer.lr": 1.5e-4}
    expected["name"] = "mine" if "mine" in how else name
    assert values(chosen.recipe) == expected
    assert chosen.sources["optimizer.lr"] == "my.yaml"
    assert chosen.sources["lora.rank"] == choose(name).sources["lora.rank"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_as_yaml_is_that_recipe(name: str, tmp_path: Path) -> None:
    assert load(written(tmp_path / "my.yaml", dump(choose(name).recipe))).recipe == choose(name).recipe


def test_the_command_prints_one(tmp_path: Path) -> None:
    done = dsv4("recipes", "flash-lora", "--yaml")
    assert done.returncode == 0
    assert load(written(tmp_path / "my.yaml", done.stdout)).recipe == choose("flash-lora").recipe
    assert "name one" in dsv4("recipes", "--yaml").stderr


@pytest.mark.parametrize("text", ["name: mine\nseed: 7\n", "optimizer: {lr: 1e-4}\n", "name: ''\nlora: {rank: 4}\n"])
def test_a_file_that_names_no_recipe_gets_no_hidden_values(text: str, tmp_path: Path) -> None:
    path = written(tmp_path / "my.yaml", text)
    with pytest.raises(BridgeError, match=r"says nothing of model, parallel, .*write one as base: flash-lora"):
        load(path)
    done = dsv4("train", path, "--dry-run")
    assert done.returncode == 2 and "names no recipe" in done.stderr


def test_a_whole_file_of_any_name_is_a_recipe(tmp_path: Path) -> None:
    mine = replace(choose("flash-lora").recipe, name="mine")
    whole = dump(mine)
    assert load(written(tmp_path / "my.yaml", whole)).recipe == mine
    older = "\n".join(line for line in whole.splitlines() if "profile:" not in line)  # of a release that lacked a key
    assert load(written(tmp_path / "my.yaml", older)).recipe == mine


@pytest.mark.parametrize("word", ["extends", "inherits", "recipe", "defaults"])
def test_what_others_call_the_base(word: str, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=f"there is no '{word}'; write base: flash-lora"):
        load(written(tmp_path / "my.yaml", f"{word}: flash-lora\nname: flash-lora\n"))


def test_an_empty_file_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="expected keys and values, found nothing"):
        load(written(tmp_path / "my.yaml", ""))


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
for one, next_one in zip("abcdefg", "bcdefgh", strict=True):
    BOMB += f"{next_one}: &{next_one} [{', '.join([f'*{one}'] * 9)}]\n"
HOSTILE = [
    "base: flash-lorra\n",
    "base: 7\n",
    "base: [flash-lora]\n",
    "seed: !!int ''\n",
    "seed: !!int x\n",
    "seed: !!float ''\n",
    "seed: 2020-13-45\n",
    "seed: 2020-01-02\n",
    "seed: !!timestamp x\n",
    "seed: !!binary 'x'\n",
    "seed: !!python/object/apply:os.system ['true']\n",
    'out: "\\U00110000"\n',
    "seed: " + "9" * 5000 + "\n",
    "optimizer: {lr: " + "9" * 5000 + "}\n",
    "optimizer: {lr: .nan}\n",
    "optimizer: {lr: .inf}\n",
    "optimizer: {lr: [1e-4]}\n",
    "? [a, b]\n: 1\n",
    "? {a: b}\n: 1\n",
    "<<: 7\n",
    "a: &a [*a]\n",
    "seed: &a [*a]\n",
    BOMB,
    BOMB + "seed: *h\n",
    "[" * 3000,
    "seed: 1\nseed: 2\n",
    "\x00",
    "data: 7\n",
    "data: {train: [[a]]}\n",
    "null: 1\n",
    "1: 2\n",
    "- a\n",
    "",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_file_that_is_no_recipe_is_one_message(text: str, tmp_path: Path) -> None:
    with pytest.raises(BridgeError) as caught:
        load(written(tmp_path / "my.yaml", text))
    assert len(str(caught.value)) < 1000


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    rng, refused = random.Random(3), 0
    whole = dump(choose("flash-lora").recipe).encode()
    for _ in range(120):
        path = tmp_path / "my.yaml"
        path.write_bytes(mutate_yaml(whole, rng))
        try:
            load(path)
        except BridgeError as error:
            refused += 1
            assert len(str(error)) < 2000
    assert refused > 40
