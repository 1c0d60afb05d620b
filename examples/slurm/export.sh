#!/usr/bin/env bash
# Convert a Megatron checkpoint to the released format on 4 nodes that share a file system.
#
#   sbatch export.sh [--option ...]
#
# MEGATRON, HF (what it came from) and OUT are on that file system.
#SBATCH --job-name=export
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=02:00:00
set -euo pipefail

: "${MEGATRON:?Megatron checkpoint}"
: "${OUT:?new released folder}"
: "${HF:?released folder that it came from}"

# One process a node shares the files of the conversion with the others; no GPU is used.
# shellcheck disable=SC2016 # the ranks expand these, not this shell
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
  exec dsv4 "$@"
' dsv4 export "$MEGATRON" "$OUT" --like "$HF" --workers 4 "$@"
