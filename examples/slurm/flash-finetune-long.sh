#!/usr/bin/env bash
# Fine-tune all of Flash on long chats, 128K tokens a row: 16 nodes of 8 GPUs with 80 GB.
#
#   sbatch flash-finetune-long.sh [key=value ...]
#
# START is the released folder, DATA a folder that `dsv4 data --seq-length 131072` made of chats.
#SBATCH --job-name=flash-finetune-long
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Five minutes before the end every rank is told to save and stops; submitting the same again goes on from there, and
# so does --requeue behind the failure of a node.
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

: "${START:=$PWD/DeepSeek-V4-Flash}"
: "${DATA:?folder of the chats that dsv4 data made}"
: "${OUT:=$PWD/runs/flash-finetune-long}"

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=29500
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export NCCL_NVLS_ENABLE=0 TORCH_NCCL_AVOID_RECORD_STREAMS=1

# One process a GPU, started by srun itself: a signal to the job reaches every rank.
# shellcheck disable=SC2016 # the ranks expand these, not this shell
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec dsv4 train "$@"
' dsv4 flash-finetune-long start="$START" data.train="$DATA" out="$OUT" "$@"
