"""RECIPES: one base, `Recipe()`, and small named differences, each with its source. Data, no logic."""

from typing import Any

from .recipe import BRIDGE, OURS, REPORT

Differences = dict[str, tuple[Any, str]]

_DENSE: Differences = {"model.dense_attention": (True, f"{REPORT}: dense attention for the first trillion tokens")}
_WARMUP: Differences = {
    "losses.indexer": ("warmup", f"{REPORT}: a short warm-up before sparse attention"),
    "schedule.steps": (1000, f"{OURS}: the report does not give it"),
    "schedule.warmup": (50, OURS),
    "schedule.decay": ("constant", OURS),
    "losses.mtp": (0.0, f"{OURS}: nothing but the indexers learns"),
    "losses.mtp_late": (None, OURS),
    "losses.balance": (0.0, f"{OURS}: nothing but the indexers learns"),
    "losses.bias_update": (0.0, f"{OURS}: nothing but the indexers learns"),
    "optimizer.moments_dtype": ("float32", OURS),
}
_SPARSE: Differences = {
    "data.seq_length": (65536, f"{REPORT}: sparse attention from 64K"),
    "losses.indexer": ("sparse", REPORT),
    "parallel.ep": (8, f"{OURS}: by dsv4 plan"),
    "parallel.tp": (4, f"{OURS}: by dsv4 plan, for Muon's state"),
    "parallel.cp": (8, f"{OURS}: by dsv4 plan, for the activations of 64K tokens"),
    "parallel.gpus": (512, f"{OURS}: by dsv4 plan"),
}
_MILLION: Differences = {
    "data.seq_length": (1 << 20, f"{REPORT}: the last length of pretraining, 4K, 16K, 64K, 1M"),
    "batch.size": (72, f"{REPORT}: 75.5 million tokens"),
    "parallel.pp": (1, f"{OURS}: by dsv4 plan"),
    "parallel.cp": (32, f"{OURS}: by dsv4 plan, for the activations of a million tokens"),
    "parallel.ep": (256, f"{OURS}: by dsv4 plan, for Muon's state without a pipeline"),
    "schedule.steps": (1000, f"{OURS}: the report does not give it"),
    "schedule.warmup": (0, f"{OURS}: it goes on where 64K tokens ended"),
    "schedule.decay": ("cosine", f"{REPORT}: cosine at the end"),
    "schedule.decay_steps": (0, f"{OURS}: all of it"),
    "losses.mtp": (0.1, f"{REPORT}: once the learning rate decays"),
    "losses.mtp_late": (None, OURS),
    "checkpoint.save_every": (50, f"{OURS}: 3.8 billion tokens"),
    "log.valid_every": (50, f"{OURS}: as often as it saves"),
    "log.valid_steps": (2, f"{OURS}: two million tokens a data-parallel rank"),
}
_MUON: Differences = {
    "optimizer.name": ("muon", REPORT),
    "optimizer.distributed": (False, f"{BRIDGE}: Muon needs whole matrices"),
    "optimizer.moments_dtype": ("float32", OURS),
    "parallel.ep": (16, f"{OURS}: by dsv4 plan, for state that is not cut over data-parallel ranks"),
}
_PRO: Differences = {
    "variant": ("Pro", OURS),
    "optimizer.lr": (2.0e-4, f"{REPORT}: Pro"),
    "optimizer.min_lr": (2.0e-5, f"{REPORT}: Pro"),
    "parallel.pp": (16, f"{BRIDGE}: Pro on H100"),
    "parallel.ep": (32, f"{OURS}: by dsv4 plan, for 80 GB"),
    "parallel.gpus": (1024, f"{OURS}: by dsv4 plan, with full recompute"),
    "batch.size": (1024, f"{OURS}: 16 micro-batches a pipeline"),
}
_RAMP: Differences = {
    "batch.ramp": ("0:2304 2304000:4608 9216000:9216 27648000:18432", f"{OURS}: the report names the end only"),
}
_FINETUNE: Differences = {
    "data.kind": ("chat", OURS),
    "batch.size": (128, f"{BRIDGE}: sft"),
    "parallel.gpus": (64, f"{OURS}: by dsv4 plan, for 80 GB; float32 gradients take 128"),
    "optimizer.grad_dtype": ("bf16", f"{OURS}: by dsv4 plan, for 64 GPUs of 80 GB"),
    "optimizer.lr": (5e-6, f"{BRIDGE}: sft"),
    "optimizer.min_lr": (0.0, f"{BRIDGE}: sft"),
    "optimizer.beta2": (0.98, f"{BRIDGE}: sft"),
    "optimizer.eps": (1e-8, f"{OURS}: with so small a rate, noise must not make whole steps"),
    "schedule.steps": (1000, f"{BRIDGE}: sft"),
    "schedule.warmup": (50, f"{BRIDGE}: sft"),
    "schedule.decay": ("cosine", f"{BRIDGE}: sft"),
    "schedule.decay_steps": (0, f"{BRIDGE}: sft"),
    "losses.mtp": (0.1, f"{BRIDGE}: sft"),
    "losses.per_token": (True, f"{OURS}: every learned token counts alike"),
    "losses.mtp_late": (None, OURS),
    "losses.balance": (0.0, f"{BRIDGE}: aux loss 0"),
    "losses.bias_update": (0.0, f"{OURS}: released biases stay as they are"),
    "checkpoint.save_every": (100, f"{BRIDGE}: sft"),
    "log.valid_every": (100, f"{BRIDGE}: sft"),
    "data.seed": (5678, f"{BRIDGE}: sft"),
    "seed": (5678, f"{BRIDGE}: sft"),
}
_LONG_CHATS: Differences = {
    "data.seq_length": (1 << 17, "published fine-tunings pack 128K: Megatron-Bridge issue 5797, miles issue 1766"),
    "batch.size": (64, f"{OURS}: 8.4 million tokens"),
    "parallel.cp": (16, "Megatron-Bridge issue 5797: 160 GPUs of 192 GB; by dsv4 plan, for 80 GB"),
    "parallel.gpus": (128, f"{OURS}: by dsv4 plan, for 80 GB"),
    "log.valid_steps": (4, f"{OURS}: half a million tokens a data-parallel rank"),
}
_NO_MTP: Differences = {
    "model.mtp": (False, f"{BRIDGE}: flash_no_mtp_sft"),
    "losses.mtp": (0.0, f"{BRIDGE}: flash_no_mtp_sft"),
}
_LORA: Differences = {
    "optimizer.lr": (1e-4, f"{BRIDGE}: peft"),
    "optimizer.moments_dtype": ("float32", f"{OURS}: adapters are small"),
    "lora.rank": (32, f"{BRIDGE}: peft"),
    "model.experts": ("grouped", OURS),
    "parallel.pp": (1, f"{OURS}: by dsv4 plan"),
    "parallel.gpus": (8, f"{OURS}: by dsv4 plan, for 141 GB; with 80 GB parallel.ep=16 on 16 GPUs"),
}

RECIPES: dict[str, tuple[str, tuple[Differences, ...]]] = {
    "flash-pretrain": ("Pretraining of Flash with AdamW, first phase: dense attention", (_DENSE,)),
    "flash-pretrain-muon": ("The same with Muon, as the report has it", (_DENSE, _MUON)),
    "flash-pretrain-full": (
        "Pretraining of Flash with Muon at the report's batch of 75.5 million tokens",
        (
            _DENSE,
            _MUON,
            _RAMP,
            {
                "batch.size": (18432, f"{REPORT}: 75.5 million tokens of 4,096"),
                "parallel.gpus": (2048, OURS),
            },
        ),
    ),
    "flash-indexer-warmup": ("Between the phases: the indexers alone learn", (_WARMUP,)),
    "flash-pretrain-sparse": ("Pretraining of Flash with Muon, 64K tokens, sparse attention", (_MUON, _SPARSE)),
    "flash-long-1m": (
        "The last stage of pretraining of Flash: a million tokens, from the run of 64K",
        (_MUON, _SPARSE, _MILLION),
    ),
    "pro-pretrain": ("Pretraining of Pro with AdamW, first phase", (_DENSE, _PRO)),
    "pro-pretrain-muon": (
        "The same with Muon, as the report has it",
        (_DENSE, _PRO, _MUON, {"parallel.ep": (64, f"{OURS}: by dsv4 plan, for 80 GB")}),
    ),
    "flash-finetune": ("Full fine-tuning of Flash on chats, draft block included", (_FINETUNE,)),
    "flash-finetune-long": (
        "Full fine-tuning of Flash on long chats, 128K tokens a row",
        (_FINETUNE, _LONG_CHATS),
    ),
    "flash-finetune-no-mtp": ("Full fine-tuning of Flash on chats without the draft block", (_FINETUNE, _NO_MTP)),
    "flash-lora": ("LoRA on Flash's attention projections", (_FINETUNE, _NO_MTP, _LORA)),
    "flash-dora": (
        "DoRA on Flash's attention projections",
        (
            _FINETUNE,
            _NO_MTP,
            _LORA,
            {"lora.dora": (True, OURS), "lora.alpha": (64.0, f"{BRIDGE}: DoRA")},
        ),
    ),
}
