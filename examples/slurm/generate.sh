#!/usr/bin/env bash
# Continue a prompt with Flash: two nodes of 8 GPUs.
#
#   sbatch generate.sh --prompt TEXT [--option ...]
#
# CKPT is a released folder or a Megatron checkpoint, as of a run that has just ended.
#SBATCH --job-name=generate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=01:00:00
set -euo pipefail

: "${CKPT:?released folder or Megatron checkpoint}"

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=29500

# Every GPU holds a share of the experts; the first process writes the text.
# shellcheck disable=SC2016 # the ranks expand these, not this shell
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec dsv4 generate "$@"
' dsv4 "$CKPT" --dtype bf16 "$@"
