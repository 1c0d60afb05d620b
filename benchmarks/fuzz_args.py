"""Arguments that a run stored, as `rename` translates them; see `fuzz`."""

import argparse
import io
import pickle
import random
from pathlib import Path

from dsv4_bridge import BridgeError
from dsv4_bridge.spec.megatron import NAMINGS
from dsv4_bridge.spec.megatron_config import megatron_model
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.store.torch_dist.common_state import renamed_common_state
from dsv4_bridge.store.torch_dist.frames import item_of
from mutations import mutate_bytes, mutate_pickle, odd_value


class StoredArgs:
    """The common state of a checkpoint: its zip, its pickle, its values."""

    def __init__(self, folder: Path, seed: int):
        import torch

        self._seed = seed
        self._models = [megatron_model(tiny(VARIANTS["Flash"]), naming) for naming in NAMINGS]
        self._sound = []
        for model in self._models:
            buffer = io.BytesIO()
            torch.save({"args": argparse.Namespace(**model), "rng": torch.arange(3)}, buffer)
            self._sound.append(buffer.getvalue())

    def run(self, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        which = rng.randrange(2)
        match rng.randrange(4):
            case 0:
                item = mutate_bytes(self._sound[which], rng)
            case 1:
                model = dict(self._models[which])
                for key in rng.sample(sorted(model), rng.choice((1, 1, 3))):
                    model[key] = odd_value(rng)
                item = self._item(pickle.dumps({"args": argparse.Namespace(**model)}, rng.choice((2, 4, 5))))
            case 2:
                data = pickle.dumps({"args": argparse.Namespace(**self._models[which])}, rng.choice((2, 3, 4, 5)))
                item = self._item(mutate_pickle(data, rng))
            case _:
                data = pickle.dumps({"args": argparse.Namespace(**self._models[which])}, rng.choice((2, 3, 4, 5)))
                item = self._item(mutate_bytes(data, rng))
        found = renamed_common_state(item, NAMINGS[1 - which], "reading common.pt")
        if found is not None:
            back = renamed_common_state(found, NAMINGS[which], "reading it again")
            if back is None:
                raise AssertionError("what was translated cannot be translated back")
        elif rng.random() < 0.5:
            raise BridgeError("left as it is")

    def _item(self, data: bytes) -> bytes:
        return item_of({"data.pkl": data, "byteorder": b"little", "version": b"3\n"})
