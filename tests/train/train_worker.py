"""One rank of a test that trains over several processes: many runs in one process group, one after another."""

import gc
import json
import sys
from pathlib import Path


def main(path: str) -> None:
    told = json.loads(Path(path).read_text())
    import torch

    torch.set_num_threads(1)
    import torch.distributed as dist
    from megatron.core import parallel_state
    from training import recipe

    from dsv4_bridge.ranks import Ranks
    from dsv4_bridge.train.loop import train
    from dsv4_bridge.train.plan import recipe_spec

    ranks, found = Ranks.from_environment(), []
    for name, words in told["runs"]:
        chosen = recipe(name, *words)
        gc.freeze()  # see training.run
        outcome = train(chosen, recipe_spec(chosen), ranks.world, lambda _: None)
        found.append(outcome.losses)
        dist.barrier()
        parallel_state.destroy_model_parallel()
    if ranks.rank == 0:
        Path(told["result"]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    main(sys.argv[1])
