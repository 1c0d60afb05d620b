#!/usr/bin/env bash
# Convert a released checkpoint to Megatron on 4 nodes that share a file system.
#
#   sbatch import.sh [--option ...]
#
# HF and OUT are on that file system. Repeat with --resume after a failure.
#SBATCH --job-name=import
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=02:00:00
set -euo pipefail

: "${HF:?released folder}"
: "${OUT:?folder of the Megatron checkpoint}"

# One process a node shares the files of the conversion with the others; no GPU is used.
# shellcheck disable=SC2016 # the ranks expand these, not this shell
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
  exec dsv4 "$@"
' dsv4 import "$HF" "$OUT" --workers 4 "$@"
