#!/usr/bin/env bash
# A verb of dsv4 on the nodes of a Slurm job, a process for each GPU.
#
#   sbatch --nodes=8 --job-name=tune dsv4.sh train flash-finetune start=… data.train=… out=…
#   sbatch --nodes=2 --time=1:00:00 dsv4.sh generate CKPT --dtype bf16 --prompt …
#   sbatch --nodes=4 --ntasks-per-node=1 --gpus-per-node=0 --time=2:00:00 dsv4.sh import HF OUT --workers 4
#
# Options of sbatch before the script's name overrule the lines below: --account, --partition and --qos among them (or
# SBATCH_ACCOUNT, SBATCH_PARTITION and SBATCH_QOS in the environment). `dsv4 recipes NAME` says how many GPUs a recipe
# was planned for, as parallel.gpus. All folders are on a file system that the nodes share.
#
# From the environment:
#   VENV=DIR        a virtual environment that has dsv4
#   SETUP=FILE      a script to source first, with `module load …` and the like
#   CONTAINER=IMAGE run in it (pyxis and enroot); MOUNTS=/data:/data,… are its --container-mounts
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Five minutes before the end every rank is told to save and stops; submitting the same again goes on from there, and
# so does --requeue behind the failure of a node.
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if (($# == 0)); then
  echo "usage: sbatch [--nodes=N …] $0 VERB [words of dsv4]" >&2
  exit 2
fi
if [[ -n ${SETUP:-} ]]; then
  # shellcheck disable=SC1090 # it is yours
  source "$SETUP"
fi
if [[ -n ${VENV:-} ]]; then
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
fi

export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export NCCL_NVLS_ENABLE=0 TORCH_NCCL_AVOID_RECORD_STREAMS=1
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8} # newer sruns do not take it from the job

inside=()
if [[ -n ${CONTAINER:-} ]]; then
  inside+=(--container-image="$CONTAINER" --container-mounts="${MOUNTS:-$PWD:$PWD}" --container-workdir="$PWD")
fi

# srun starts every process itself, so that a signal to the job reaches all ranks; dsv4 reads its rank from Slurm.
exec srun --kill-on-bad-exit=1 ${inside[@]+"${inside[@]}"} dsv4 "$@"
