"""Our model under watch: every site compared with the record as it passes, choices replaced on request.

Nothing of ours is kept: a value is compared where it appears. Our layouts are [s, b, …] where
transformers has [b, s, …].
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import BridgeError
from ..mcore.layers.observe import watching
from .metrics import compare_choices, compare_logits, compare_values
from .reference import Record
from .result import Run, SiteResult, Tolerance
from .sites import SITES

# Sites whose tensors have the batch first already.
_BATCH_FIRST = {"attn.compressor", "attn.index"}


class Watcher:
    """Compares what passes; gives the reference's choices back where `replay` says so."""

    def __init__(self, record: Record, shape: tuple[int, int], replay: bool, tolerance: Tolerance, hashed: int):
        self.record, self.shape, self.replay, self.tolerance, self.hashed = record, shape, replay, tolerance, hashed
        self.found: list[SiteResult] = []
        self.blocks: list[str] = []

    def __call__(self, site: str, block: str, value: Tensor) -> Tensor | None:
        theirs = self.record.values.get((block, site))
        if theirs is None:
            raise BridgeError(f"comparing {block} {site}: the reference has nothing there, a mistake in this package")
        layer = int(block.removeprefix("layers.")) if block.startswith("layers.") else None
        self.blocks.append(block)
        ours = self._turned(site, value.detach()).cpu()
        if SITES[site].choices:
            found = compare_choices(
                ours.flatten(0, -2), theirs.flatten(0, -2), self.record.scores.get((block, site)), self.tolerance.tie
            )
            table = site == "ffn.router" and layer is not None and layer < self.hashed
            self.found.append(SiteResult(layer, site, found, table))
            return self._back(site, _where_differing(ours, theirs)).to(value.device) if self.replay else None
        self.found.append(SiteResult(layer, site, compare_values(ours, theirs.reshape(ours.shape))))
        return None

    def check_all_seen(self) -> None:
        """BridgeError where the record has a site that never came by."""
        seen = {(block, s.site) for block, s in zip(self.blocks, self.found, strict=True)}
        if missed := set(self.record.values) - seen:
            raise BridgeError(f"comparing: our model never came by {sorted(missed)[0]}, a mistake in this package")

    def _turned(self, site: str, value: Tensor) -> Tensor:
        """Ours in transformers' layout."""
        if site in _BATCH_FIRST:
            return value
        if site == "ffn.router":  # [s*b, k] -> [b*s, k]
            batch, length = self.shape
            return value.unflatten(0, (length, batch)).transpose(0, 1).flatten(0, 1)
        return value.transpose(0, 1)

    def _back(self, site: str, value: Tensor) -> Tensor:
        """The reference's choice in our layout."""
        if site == "ffn.router":
            return value.unflatten(0, self.shape).transpose(0, 1).flatten(0, 1)
        return value


def _where_differing(ours: Tensor, theirs: Tensor) -> Tensor:
    """Theirs; sets that are the same stay in our order, so that replay changes nothing before a choice differs."""
    if ours.shape != theirs.shape:
        return theirs
    same = (ours.sort(-1).values == theirs.sort(-1).values).all(-1, keepdim=True)
    return torch.where(same, ours, theirs)


def compare_run(model: Any, ids: Tensor, record: Record, replay: bool, tolerance: Tolerance) -> Run:
    """Run our model on ids [b, s] and compare with the record.

    Args:
        model: ours.
        ids: what the record was made with.
        record: of the reference.
        replay: whether our model takes the reference's experts and blocks.
        tolerance: for near-ties.
    """
    batch, length = ids.shape
    watcher = Watcher(record, (batch, length), replay, tolerance, model.spec.num_hash_layers)
    with torch.no_grad(), watching(watcher):
        logits = model(ids).cpu()
    watcher.check_all_seen()
    return Run(tuple(watcher.found), compare_logits(logits, record.logits))
