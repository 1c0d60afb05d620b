"""What a training run is, as data: every value that decides it, with where its default comes from."""

from dataclasses import dataclass, field
from typing import Any

from ..parallel.topology import Sizes
from ..planning.activations import LOSS_CHUNK

REPORT = "technical report, arXiv 2606.19348"
BRIDGE = "Megatron-Bridge's DeepSeek-V4 recipes"
OURS = "this package"


SEEDS = 1 << 32  # numpy's


def fact(
    default: Any, source: str, *, choices: tuple[str, ...] = (), least: float = 0, below: float | None = None
) -> Any:
    """A field with the source of its default, and what it may be.

    Args:
        default: its value where nothing else is said.
        source: where that is from.
        choices: the words that it may be; empty: any.
        least: the smallest number.
        below: what a number must stay under; None: what its type holds.
    """
    return field(default=default, metadata={"source": source, "choices": choices, "least": least, "below": below})


@dataclass(frozen=True)
class Model:
    """The model and how its layers are computed.

    Attributes:
        mtp: whether the draft block is trained along; without it, it is not in the model.
        dtype: type of the parameters, `bf16` or `float32`; what checkpoints keep in float32 stays so.
        experts: how a rank holds its experts: sequential, grouped, transformer_engine.
        kernels: what computes attention, indexer, mixing, norms and activations: auto (Triton on a GPU), torch, triton.
        deterministic: fused kernels add gradients up in a fixed order, which takes longer.
        recompute: what the backward computes again: none, moe (experts), full (whole layers).
        loss_chunk: tokens whose logits a rank holds at a time; the backward makes them again; 0: all, once.
        dense_attention: layers with an indexer attend to all blocks, whatever it would choose.
        initial_seed: of the weights, where training starts from none.
    """

    mtp: bool = fact(True, REPORT)
    dtype: str = fact("bf16", BRIDGE, choices=("bf16", "float32"))
    experts: str = fact("grouped", OURS, choices=("sequential", "grouped", "transformer_engine"))
    kernels: str = fact("auto", OURS, choices=("auto", "torch", "triton"))
    deterministic: bool = fact(False, OURS)
    recompute: str = fact("full", f"{OURS}: the layers' inputs alone are kept", choices=("none", "moe", "full"))
    loss_chunk: int = fact(LOSS_CHUNK, f"{OURS}: 1 GB of logits")
    dense_attention: bool = fact(False, "released models: the indexer chooses")
    initial_seed: int = fact(1234, BRIDGE, below=SEEDS)


@dataclass(frozen=True)
class Parallel:
    """How the model is cut over ranks; data parallelism takes the ranks that are left.

    Attributes:
        tp: tensor-parallel ranks, with sequence parallelism.
        pp: pipeline ranks.
        vp: chunks of layers a pipeline rank.
        ep: expert-parallel ranks.
        etp: tensor-parallel ranks of an expert.
        cp: context-parallel ranks: each has 1/cp of the tokens of every row.
        layout: the pipeline in its written form; empty: solved.
        gpus: how many the recipe was made for; a dry run plans them, training takes those that are there.
        overlap: data-parallel ranks sum gradients bucket by bucket while the backward goes on, and gather what AdamW
            moved while the forward does.
        bucket: parameters of a bucket at least; 0: megatron-core's, 40 million or a million a data-parallel rank.
        gc_every: steps between Python's garbage collections, on all ranks at once; 0: when Python does.
    """

    tp: int = fact(1, BRIDGE, least=1)
    pp: int = fact(8, f"{OURS}: by dsv4 plan, for 80 GB", least=1)
    vp: int = fact(1, BRIDGE, least=1)
    ep: int = fact(8, BRIDGE, least=1)
    etp: int = fact(1, BRIDGE, least=1)
    cp: int = fact(1, BRIDGE, least=1)
    layout: str = fact("", OURS)
    gpus: int = fact(128, f"{OURS}: by dsv4 plan, for 80 GB", least=1)
    overlap: bool = fact(True, BRIDGE)
    bucket: int = fact(0, BRIDGE)
    gc_every: int = fact(5, BRIDGE)

    @property
    def sizes(self) -> Sizes:
        """Of the groups that cut the model."""
        return Sizes(self.tp, self.pp, self.ep, self.etp, self.cp, self.vp)


@dataclass(frozen=True)
class Data:
    """What it learns from.

    Attributes:
        kind: `text` (megatron's .bin/.idx, made by `dsv4 data`) or `chat` (prepared by `dsv4 data`).
        train: text: one prefix, or weights and prefixes in turn; chat: one prepared folder.
        valid: the same, for validation; empty: for text a part of `train` by `split`, for chat none.
        split: shares of text for training, validation and test, where `valid` is empty.
        seq_length: tokens a row.
        documents_apart: attention never crosses a document's end (the report's sample-level mask).
        seed: of the order.
        cache: folder for megatron's index of the samples; empty: in the output folder.
    """

    kind: str = fact("text", OURS, choices=("text", "chat"))
    train: tuple[str, ...] = fact((), "yours")
    valid: tuple[str, ...] = fact((), "yours")
    split: str = fact("9999,8,2", BRIDGE)
    seq_length: int = fact(4096, f"{REPORT}: first phase of pretraining", least=1)
    documents_apart: bool = fact(True, f"{REPORT}: sample-level attention mask")
    seed: int = fact(1234, BRIDGE, below=SEEDS)
    cache: str = fact("", OURS)


@dataclass(frozen=True)
class Batch:
    """Rows a step.

    Attributes:
        micro: rows a micro-batch and rank.
        size: rows of all ranks a step.
        ramp: sizes before, as megatron writes them: `0:64 4000:128`, rows consumed and size from there on.
    """

    micro: int = fact(1, BRIDGE, least=1)
    size: int = fact(256, f"{BRIDGE}: with 8 pipeline ranks", least=1)
    ramp: str = fact("", OURS)


@dataclass(frozen=True)
class Optimizer:
    """How weights move.

    Attributes:
        name: adamw or muon (matrices by Muon, the rest by AdamW).
        lr: peak learning rate.
        min_lr: learning rate at the end.
        weight_decay: decoupled; none on norms, biases and other vectors.
        beta1: of AdamW.
        beta2: of AdamW.
        eps: of AdamW.
        clip_grad: gradients' norm at most; 0: unlimited.
        moments_dtype: type of AdamW's moments, float32 or bf16; main weights are float32.
        grad_dtype: type that gradients are summed in.
        distributed: cut optimizer state over data-parallel ranks (AdamW).
        muon_momentum: of Muon.
        muon_nesterov: whether Muon looks ahead.
        muon_rms: RMS that Muon's updates are scaled to.
        muon_steps: Newton-Schulz iterations, of the first and of the second kind.
    """

    name: str = fact("adamw", BRIDGE, choices=("adamw", "muon"))
    lr: float = fact(2.7e-4, f"{REPORT}: Flash")
    min_lr: float = fact(2.7e-5, f"{REPORT}: Flash")
    weight_decay: float = fact(0.1, REPORT)
    beta1: float = fact(0.9, REPORT, below=1)
    beta2: float = fact(0.95, REPORT, below=1)
    eps: float = fact(1e-20, REPORT)
    clip_grad: float = fact(1.0, BRIDGE)
    moments_dtype: str = fact("bf16", f"{BRIDGE}: precision-aware", choices=("float32", "bf16"))
    grad_dtype: str = fact("float32", BRIDGE, choices=("float32", "bf16"))
    distributed: bool = fact(True, BRIDGE)
    muon_momentum: float = fact(0.95, REPORT, below=1)
    muon_nesterov: bool = fact(True, REPORT)
    muon_rms: float = fact(0.18, REPORT)
    muon_steps: tuple[int, ...] = fact((8, 2), REPORT)


@dataclass(frozen=True)
class Schedule:
    """How long, and the learning rate on the way.

    Attributes:
        steps: of the run.
        warmup: steps of linear warm-up.
        decay: cosine, linear, constant, or wsd: constant, then a cosine over the last `decay_steps`.
        decay_steps: steps of the decay; 0: all after the warm-up.
    """

    steps: int = fact(1_000_000, BRIDGE, least=1)
    warmup: int = fact(2000, REPORT)
    decay: str = fact(
        "wsd",
        f"{REPORT}: constant most of training, cosine at the end",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    decay_steps: int = fact(100_000, f"{OURS}: the report does not give it")


@dataclass(frozen=True)
class Losses:
    """What is added to the language model's loss.

    Attributes:
        mtp: weight of the draft block's loss.
        mtp_late: its weight once the learning rate decays; None: the same.
        balance: weight of the sequence-wise balance loss.
        bias_update: how far a step moves the routers' biases.
        indexer: frozen; warmup: attention is dense, and the indexers alone learn, on all blocks; sparse: they
            learn along with the model, on the blocks that they chose.
        indexer_weight: weight of the indexer's own loss.
        per_token: average over all learned tokens of a step, so that it does not matter how chats are packed;
            otherwise over each micro-batch, and over these.
    """

    mtp: float = fact(0.3, REPORT)
    mtp_late: float | None = fact(0.1, REPORT)
    balance: float = fact(1e-4, REPORT)
    bias_update: float = fact(1e-3, REPORT)
    indexer: str = fact(
        "frozen",
        "released models are fine-tuned so; see the page on objectives",
        choices=("frozen", "warmup", "sparse"),
    )
    indexer_weight: float = fact(0.01, BRIDGE)
    per_token: bool = fact(False, OURS)


@dataclass(frozen=True)
class Lora:
    """Adapters.

    Attributes:
        rank: inner width; 0: no adapters, all weights are trained.
        alpha: the update is scaled by alpha / rank.
        dropout: of the adapters' inputs.
        targets: keys of the table's rows; empty: the attention projections that peft can load.
        dora: with magnitudes (DoRA).
        start: a folder of peft, or a run of adapters, to begin from.
    """

    rank: int = fact(0, OURS)
    alpha: float = fact(32.0, BRIDGE)
    dropout: float = fact(0.0, BRIDGE, below=1)
    targets: tuple[str, ...] = fact((), OURS)
    dora: bool = fact(False, OURS)
    start: str = fact("", OURS)


@dataclass(frozen=True)
class Checkpoint:
    """What is kept.

    Attributes:
        save_every: steps between checkpoints; the last step is always saved.
        keep: how many stay.
        background: write while training goes on.
        optimizer: save optimizer state; without it a run cannot resume exactly.
    """

    save_every: int = fact(2000, BRIDGE, least=1)
    keep: int = fact(2, OURS, least=1)
    background: bool = fact(False, BRIDGE)
    optimizer: bool = fact(True, OURS)


@dataclass(frozen=True)
class Log:
    """What is told.

    Attributes:
        every: steps between lines on the terminal; the JSONL has every step.
        tensorboard: write TensorBoard's events.
        valid_every: steps between validations; 0: none.
        valid_steps: micro-batches of a validation, a rank.
        spike: stop where the loss is so many nats above its recent median; 0: never.
        gpu: name of the GPU, for MFU; empty: the device's own.
        wandb: project of Weights & Biases that is told every step; empty: none. WANDB_MODE=offline keeps it here.
        mlflow: experiment of MLflow that is told every step, at MLFLOW_TRACKING_URI; empty: none.
        ranks: every rank writes a log of its own, `logs/rank-N.log` in the output folder.
        profile: the step whose time is taken apart, into `profile` in the output folder; 0: none.
    """

    every: int = fact(10, BRIDGE, least=1)
    tensorboard: bool = fact(True, OURS)
    valid_every: int = fact(2000, BRIDGE)
    valid_steps: int = fact(32, BRIDGE)
    spike: float = fact(3.0, OURS)
    gpu: str = fact("", OURS)
    wandb: str = fact("", OURS)
    mlflow: str = fact("", OURS)
    ranks: bool = fact(False, OURS)
    profile: int = fact(0, OURS)


@dataclass(frozen=True)
class Recipe:
    """A run.

    Attributes:
        name: its name.
        summary: what it is for.
        variant: the released variant whose numbers the model has, where `start` does not say.
        start: Hugging Face folder or Megatron checkpoint to start from; empty: fresh weights.
        tokenizer: a checkpoint whose tokenizer and other small files those of the run carry; empty: that of `start`.
        out: folder of checkpoints and logs.
        seed: of dropout.
    """

    name: str = fact("", OURS)
    summary: str = fact("", OURS)
    variant: str = fact("Flash", OURS)
    start: str = fact("", "yours")
    tokenizer: str = fact("", "yours")
    out: str = fact("", "yours")
    seed: int = fact(1234, BRIDGE, below=SEEDS)
    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    losses: Losses = field(default_factory=Losses)
    lora: Lora = field(default_factory=Lora)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
