"""Parity finds what differs, where it differs, and nothing else."""

import json
import math
import shutil
import sys
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from html_page import Page
from reference import small_spec
from safetensors.torch import load_file, save_file

from conftest import dsv4
from dsv4_bridge import BridgeError, import_hf, make_toy, repack
from dsv4_bridge.cli import main
from dsv4_bridge.mcore import initialize
from dsv4_bridge.parity import Inputs, parity
from dsv4_bridge.parity.inputs import token_ids
from dsv4_bridge.parity.metrics import Choice, Difference, compare_choices, compare_logits, compare_values
from dsv4_bridge.parity.opened import opened
from dsv4_bridge.parity.reference import record_reference, reference_model
from dsv4_bridge.parity.report import about, write_report
from dsv4_bridge.parity.result import ParityReport, SiteResult
from dsv4_bridge.store.hf import open_hf

pytestmark = [pytest.mark.megatron, pytest.mark.hf]

# 35 blocks of ratio 4 for a top-k of 8, one of ratio 128, unfinished ones of both.
SHORT = Inputs(seq_length=142, batch=2, seed=3)
LAYER = ["attn.mix", "attn", "ffn.mix", "ffn.router", "ffn.experts", "ffn", "streams"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("parity") / "toy", "Flash", 11, spec=small_spec())


@pytest.fixture(scope="module")
def plain(toy: Path) -> Path:
    repack(toy, toy.parent / "plain", "bf16")
    (toy.parent / "plain" / "tokenizer.json").unlink(missing_ok=True)
    return toy.parent / "plain"


def changed(folder: Path, out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a plain folder with another tensor `name`."""
    shutil.copytree(folder, out)
    checkpoint = open_hf(folder)
    file = out / checkpoint.folder.tensors[name].file
    checkpoint.close()
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file)
    return out


def noisy(tensor: torch.Tensor) -> torch.Tensor:
    """Ids another way round; values off by a third of their spread."""
    if not tensor.is_floating_point():
        return tensor.flip(0)
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    return (tensor.float() + 0.3 * tensor.float().std() * noise).to(tensor.dtype)


def at(report: ParityReport, layer: int | None, site: str, replayed: bool = False) -> SiteResult:
    run = report.replayed if replayed else report.free
    assert run is not None
    return next(s for s in run.sites if (s.layer, s.site) == (layer, site))


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize("kind", ["mxfp4", "plain", "megatron", "fp8-f32-ragged"])
def test_a_checkpoint_of_any_format_agrees(kind: str, toy: Path, plain: Path, tmp_path: Path) -> None:
    folder = {"mxfp4": toy, "plain": plain}.get(kind, tmp_path / kind)
    if kind == "megatron":
        import_hf(toy, folder)
    if kind == "fp8-f32-ragged":  # with an MTP block and widths that are no multiples of 128
        make_toy(folder, "Flash-Base", 12, ragged=True)
    report = parity(folder, inputs=SHORT)
    assert report.passed and report.verdict.site is None, report.verdict.text
    assert report.replayed is None
    assert 0 < report.free.logits.error <= 1e-5 and report.free.logits.top1 == 1
    assert report.free.logits.positions == 284 and report.free.logits.kl.shape == (2, 142)
    assert sum(s.flips for s in report.free.sites) == 0
    for layer, words in enumerate(report.layers):
        sites = [s.site for s in report.free.of_layer(layer)]
        extra = {"window": [], "HCA": ["attn.compressor"], "CSA": ["attn.compressor", "attn.index"]}
        assert sorted(sites) == sorted(LAYER + extra[words.split(",")[0]])
    assert len(report.layers) == open_hf(toy).spec.num_hidden_layers or kind == "fp8-f32-ragged"
    assert [s.site for s in report.free.of_layer(None)] == ["head"]


def test_a_megatron_checkpoint_against_the_release_it_came_from(toy: Path, tmp_path: Path) -> None:
    import_hf(toy, tmp_path / "megatron")
    inputs = Inputs(prompt_ids=(5, 3, 500))  # no block is whole
    assert parity(tmp_path / "megatron", reference_checkpoint=toy, inputs=inputs).passed


# ---------------------------------------------------------------- another model

WRONG = [
    ("embed.weight", 0, "attn.mix"),
    ("layers.0.hc_attn_base", 0, "attn.mix"),
    ("layers.0.ffn.gate.tid2eid", 0, "ffn.router"),
    ("layers.1.attn.compressor.ape", 1, "attn.compressor"),
    ("layers.1.attn.indexer.wq_b.weight", 1, "attn.index"),
    ("layers.2.attn.wo_a.weight", 2, "attn"),
    ("layers.2.hc_ffn_scale", 2, "ffn.mix"),
    ("layers.3.ffn.gate.bias", 3, "ffn.router"),
    ("layers.1.ffn.experts.3.w2.weight", 1, "ffn.experts"),
    ("layers.3.ffn.shared_experts.w1.weight", 3, "ffn"),
    ("norm.weight", None, "head"),
    ("head.weight", None, "logits"),
]


@pytest.mark.parametrize(("name", "layer", "site"), WRONG)
def test_one_wrong_tensor_is_found_where_it_acts(
    name: str, layer: int | None, site: str, plain: Path, tmp_path: Path
) -> None:
    other = changed(plain, tmp_path / "other", name, noisy)
    report = parity(plain, reference_checkpoint=other, inputs=SHORT)
    assert not report.passed and report.replayed is not None
    assert (report.verdict.layer, report.verdict.site) == (layer, site), report.verdict.text
    shown = name.replace(".experts.3.", ".experts.*.")
    assert shown in report.verdict.tensors and report.verdict.tensors[0] in report.verdict.text
    if layer:  # what comes before is untouched
        assert all(s.error <= 1e-5 and s.flips == 0 for s in report.free.of_layer(layer - 1))


def test_a_flipped_choice_is_told_from_an_error(plain: Path, tmp_path: Path) -> None:
    ids, _ = token_ids(SHORT, small_spec(), ())
    token = int(ids[1, 70])

    def swap(table: torch.Tensor) -> torch.Tensor:
        table[token] = (table[token] + 1) % 8
        return table

    other = changed(plain, tmp_path / "other", "layers.0.ffn.gate.tid2eid", swap)
    report = parity(plain, reference_checkpoint=other, inputs=SHORT, replay=True)
    count = int((ids == token).sum())
    free, own = at(report, 0, "ffn.router"), at(report, 0, "ffn.router", replayed=True)
    assert (free.flips, free.far, own.flips) == (count, count, count)
    assert at(report, 0, "ffn.experts").error > 0.1
    assert at(report, 0, "ffn.experts", replayed=True).error < 1e-5
    assert report.replayed is not None and report.replayed.logits.error <= 1e-5 < report.free.logits.error
    assert sum(s.flips for s in report.replayed.sites) == count
    # a token's experts are no matter of rounding: still another model
    assert not report.passed and (report.verdict.layer, report.verdict.site) == (0, "ffn.router")


def test_a_near_tie_that_went_the_other_way_is_no_failure(plain: Path, tmp_path: Path) -> None:
    inputs = Inputs(seq_length=256, batch=4, seed=3)
    initialize()
    with opened(plain) as (spec, values):
        model = reference_model(spec, values, torch.float32, torch.device("cpu"))
    record = record_reference(model, token_ids(inputs, spec, ())[0])
    best, gap, layer = None, math.inf, -1
    for number in range(1, spec.num_hidden_layers):
        scores = record.scores[f"layers.{number}", "ffn.router"]
        top = scores.sort(-1, descending=True)
        gaps = (top.values[:, 1] - top.values[:, 2]) / scores.abs().amax(-1)
        if float(gaps.min()) < gap:
            row = int(gaps.argmin())
            best, layer, gap = (
                (int(top.indices[row, 1]), float(top.values[row, 1] - top.values[row, 2])),
                number,
                gaps[row],
            )
    assert best is not None and gap < 1e-4

    def lower(bias: torch.Tensor) -> torch.Tensor:
        bias[best[0]] -= best[1] + 2e-6
        return bias

    other = changed(plain, tmp_path / "other", f"layers.{layer}.ffn.gate.bias", lower)
    report = parity(plain, reference_checkpoint=other, inputs=inputs)
    found = at(report, layer, "ffn.router")
    assert (found.flips, found.far) == (1, 0) and isinstance(found.found, Choice) and 0 < found.found.gap < 1e-4
    assert not report.free.within(report.tolerance)
    assert report.passed and "near-ties" in report.verdict.text
    free_only = parity(plain, reference_checkpoint=other, inputs=inputs, replay=False)
    assert not free_only.passed and "--replay" in free_only.verdict.text
    assert (free_only.verdict.layer, free_only.verdict.site) == (layer, "ffn.router")


@pytest.mark.parametrize("topk", [64, 8])
def test_bf16_agrees_at_the_last_token(topk: int, tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 13, spec=small_spec(index_topk=topk))
    report = parity(toy, inputs=Inputs(seq_length=142, batch=3, seed=5), dtype="bf16", replay=True)
    assert report.passed and report.replayed is not None
    assert report.replayed.logits.last_cosine >= 0.999
    flips = sum(s.flips for s in report.free.sites if s.site == "attn.index")
    assert (flips == 0) == (topk == 64)  # saturated: every visible block is chosen


# ---------------------------------------------------------------- metrics


def test_identical_tensors_differ_by_exactly_nothing() -> None:
    x = torch.randn(3, 7, 50)
    values = compare_values(x, x.clone())
    assert values == Difference(21, 1.0, 1.0, 0.0, 0.0, 0.0, 0)
    logits = compare_logits(x, x.clone())
    assert (logits.kl_mean, logits.kl_p95, logits.kl_max, logits.error, logits.relative) == (0, 0, 0, 0, 0)
    assert (logits.top1, logits.cosine_min, logits.last_cosine, float(logits.kl.max())) == (1, 1, 1, 0)
    ids = torch.randint(0, 9, (11, 4))
    assert compare_choices(ids, ids.flip(1), torch.randn(11, 9), 0.0).flips == 0


def test_metrics_are_those_of_their_definitions() -> None:
    ours, theirs = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [3.0, -4.5]])
    found = compare_values(ours, theirs)
    assert (found.vectors, found.max_abs, found.cosine_min) == (2, 8.5, pytest.approx(-9 / 5 / math.hypot(3, 4.5)))
    assert found.error == pytest.approx(8.5 / 4.5)
    assert found.relative == pytest.approx(math.sqrt((2 + 8.5**2) / (1 + 9 + 4.5**2)))
    theirs = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]])
    logits = compare_logits(torch.zeros(1, 2, 2), theirs)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert logits.kl.tolist() == [[pytest.approx(kl), 0.0]]
    assert (logits.kl_mean, logits.kl_p95, logits.kl_max) == (*(pytest.approx(x) for x in (kl / 2, kl, kl)),)
    assert logits.top1 == 0.5


def test_gaps_of_choices() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.996, -math.inf], [5.0, 1.0, 0.0, 0.0]])
    theirs = torch.tensor([[0, 1], [0, 1], [0, -1]])
    ours = torch.tensor([[3, 0], [2, 0], [0, 1]])
    found = compare_choices(ours, theirs, scores, 0.01)
    assert (found.queries, found.flips, found.ties, found.gap) == (3, 3, 1, math.inf)
    found = compare_choices(ours[:2], theirs[:2], scores[:2], 0.01)
    assert (found.flips, found.ties, found.gap) == (2, 1, pytest.approx(0.5))
    assert found.boundary == pytest.approx(0.001, rel=1e-3) and compare_choices(ours, theirs, None, 9).ties == 0
    hidden = compare_choices(torch.tensor([[0, 3]]), theirs[1:2], scores[1:2], 1.0)
    assert (hidden.flips, hidden.ties) == (1, 0)  # a block that the query must not see yet


def test_values_that_are_not_finite_never_pass(plain: Path, tmp_path: Path) -> None:
    x = torch.randn(4, 5)
    x[2, 3] = math.nan
    assert compare_values(x, x).error == math.inf and compare_values(x, x).not_finite == 1
    other = changed(plain, tmp_path / "other", "norm.weight", lambda t: t * math.inf)
    report = parity(plain, reference_checkpoint=other, inputs=Inputs(prompt_ids=(1, 2, 3)), replay=False)
    assert not report.passed and (report.verdict.layer, report.verdict.site) == (None, "head")
    assert "NaN" in report.verdict.text
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["free"]["logits"]["error"] is None


# ---------------------------------------------------------------- reports and the command


def test_the_page_names_every_layer_and_shows_its_pictures(plain: Path, tmp_path: Path) -> None:
    other = changed(plain, tmp_path / "<other>", "layers.2.attn.wo_a.weight", noisy)
    report = parity(plain, reference_checkpoint=other, inputs=SHORT)
    path = write_report(report, tmp_path / "report")
    page = Page(path.read_text())
    assert page.open == page.fetched == [] and "differs" in page.text and "<other>" in page.text
    assert report.verdict.text[1:] in page.text
    for layer, kind in enumerate(report.layers):
        assert f"layer {layer} ({kind})" in page.text
    assert all(version in page.text for version in report.versions.values())
    assert {"checkpoint", "by layers"} <= dict(about(report)).keys()
    assert all(f"<dt>{name}</dt><dd>" in path.read_text() for name, _ in about(report))
    assert page.rows == [8] * 3 + [3 + 2 * 3] * (2 + len(report.free.sites))
    assert len(page.pictures) == 3
    for picture in page.pictures:
        kind, _, held = picture.partition(",")
        assert kind == "data:image/png;base64" and b64decode(held)[:4] == b"\x89PNG"
    assert sorted(p.name for p in path.parent.iterdir()) == ["index.html", "parity.json"]
    assert json.loads((path.parent / "parity.json").read_text()) == json.loads(json.dumps(report.to_json()))
    with pytest.raises(BridgeError, match="not a folder"):
        write_report(report, path)


def run(monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["dsv4", "parity", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


SCHEMA = {
    "": "against bytes checkpoint device drafts dtype free inputs layers left_out narrow passed reference replayed "
    "seconds steps tables tolerance verdict versions",
    "verdict": "layer passed site tensors text",
    "tolerance": "far last_cosine least_cosine logits site tie top1",
    "logits": "cosine_mean cosine_min error kl_max kl_mean kl_p95 last_cosine not_finite positions relative top1",
    "site": "boundary cosine_mean cosine_min error flips gap layer max_abs not_finite queries relative site ties "
    "vectors",
}


def test_json_is_all_there_is_on_stdout(toy: Path) -> None:
    done = dsv4("parity", toy, "--json", "--seq-length", "37", "--replay")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data.pop("schema") == 1 and data.pop("verb") == "parity" and data.pop("version")
    assert " ".join(sorted(data)) == SCHEMA[""]
    told = {"ids": 66, "vocab_size": 512, "chosen": 4}
    assert data["passed"] and data["inputs"] == {"batch": 2, "seq_length": 37, "source": "random", "seed": 0} | told
    assert " ".join(sorted(data["verdict"])) == SCHEMA["verdict"]
    assert " ".join(sorted(data["tolerance"])) == SCHEMA["tolerance"]
    for found in (data["free"], data["replayed"]):
        assert " ".join(sorted(found["logits"])) == SCHEMA["logits"]
        assert {" ".join(sorted(site)) for site in found["sites"]} == {SCHEMA["site"]}
        assert len(found["sites"]) == 4 * len(LAYER) + 2 + 2 + 1 + 1


def test_exit_codes_and_tables(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(plain, tmp_path / "other", "layers.1.attn.wkv.weight", noisy)
    few = ("--prompt-ids", "9, 8,7,6,5", "--reference", other)
    assert run(monkeypatch, plain, *few) == 1
    brief = capsys.readouterr().out
    assert "1 x 5, prompt ids" in brief and "layer 1, attention output" in " ".join(brief.split())
    assert run(monkeypatch, plain, *few, "--sites", "--report", tmp_path / "page") == 1
    assert len(capsys.readouterr().out.splitlines()) > len(brief.splitlines()) + 20
    assert (tmp_path / "page" / "index.html").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prompt-ids", "5,x"), "'x' is none"),
        (("--prompt-ids", "5,512"), "id 512 is not one of the model's 0 to 511"),
        (("--prompt-ids", ""), "reading token ids: '' is none"),
        (("--text", "words"), "no tokenizer.json"),
        (("--text", "words", "--prompt-ids", "1"), "expected one of them"),
        (("--report", __file__), "is not a folder"),
        (("--report", "/proc/none"), "/proc cannot be written"),
        (("--reference", "nowhere"), "no such file or folder"),
        (("--dtype", "fp16"), "fp16"),
        (("--against", "vllm"), "vllm"),
    ],
)
def test_unusable_input_is_one_message(
    args: tuple[str, ...],
    message: str,
    plain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, plain, *args) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""


def test_two_models_cannot_be_compared(plain: Path, tmp_path: Path) -> None:
    other = make_toy(tmp_path / "other", "Flash", 1, spec=small_spec(index_topk=9))
    with pytest.raises(BridgeError, match="index_topk 8 and 9"):
        parity(plain, reference_checkpoint=other)


def test_what_does_not_fit_is_refused_before_loading(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    with pytest.raises(BridgeError, match=r"take about 0\.\d GB, and 0\.0 GB of memory are free"):
        parity(plain, inputs=Inputs(seq_length=1024))


def test_text_goes_through_the_tokenizer_beside_the_checkpoint(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"one": 7, "two": 3, "?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "hf").mkdir()
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    ids, facts = token_ids(Inputs(text="two one two"), small_spec(), (tmp_path,))
    assert ids.tolist() == [[0, 3, 7, 3]]  # behind BOS
    assert facts == {"batch": 1, "seq_length": 4, "source": "text", "seed": None}
