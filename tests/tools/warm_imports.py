"""What processes of tests have imported when they start; see warm.py."""

import importlib

import numpy as np

from dsv4_bridge.codec import fp8, mxfp4

for name in (
    "dsv4_bridge.mcore",  # before megatron
    "dsv4_bridge.cli.show.plan",
    "dsv4_bridge.cli.show.progress",
    "dsv4_bridge.cli.show.tables",
    "dsv4_bridge.convert.jobs",
    "dsv4_bridge.generate.generate",
    "dsv4_bridge.train.loop",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.models.mimo",
    "megatron.core.optimizer",
    "torch._dynamo",  # which optimizers import when they are made
    "torch.distributed.checkpoint",
    "typer._adapters",
):
    importlib.import_module(name)

# Compiled code is read when it is called first.
for scale in (np.full((1, 1), 127, np.uint8), np.ones((1, 1), np.float32)):
    fp8.decode(np.ones((1, 8), np.uint8), scale, np.empty((1, 8), np.uint16))
mxfp4.decode(np.ones((1, 16), np.uint8), np.full((1, 1), 127, np.uint8), np.empty((1, 32), np.uint16))
