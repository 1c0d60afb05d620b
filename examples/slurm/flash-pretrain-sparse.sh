#!/usr/bin/env bash
# Pretrain Flash on rows of 64K tokens with sparse attention: 64 nodes of 8 GPUs with 80 GB.
#
#   sbatch flash-pretrain-sparse.sh [key=value ...]
#
# START is the run whose indexers warmed up; DATA is a prefix that `dsv4 data` made; OUT gets checkpoints and logs.
#SBATCH --job-name=flash-pretrain-sparse
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=48:00:00
# Five minutes before the end every rank is told to save and stops; submitting the same again goes on from there, and
# so does --requeue behind the failure of a node.
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

: "${TOKENIZER:=}" # a released folder, for its tokenizer; empty: that of START
: "${DATA:?prefix of the data that dsv4 data made}"
: "${START:?checkpoint to go on from}"
: "${OUT:=$PWD/runs/flash-pretrain-sparse}"

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=29500
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export NCCL_NVLS_ENABLE=0 TORCH_NCCL_AVOID_RECORD_STREAMS=1

# One process a GPU, started by srun itself: a signal to the job reaches every rank.
# shellcheck disable=SC2016 # the ranks expand these, not this shell
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec dsv4 train "$@"
' dsv4 flash-pretrain-sparse start="$START" tokenizer="$TOKENIZER" data.train="$DATA" out="$OUT" "$@"
