#!/usr/bin/env bash
# Train on several nodes under SLURM, one torchrun a node: sbatch --nodes=2 scripts/slurm.sh --cfg configs/X.yaml ...
# Arguments go to main.py. Run from the project's folder, on a file system that all nodes share. Preempted jobs are put
# into the queue again and go on from their newest checkpoint.
#SBATCH --job-name=flatten
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
gpus="${SLURM_GPUS_PER_NODE##*:}"
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_NNODES" \
  --nproc_per_node="$gpus" \
  --rdzv_id="$SLURM_JOB_ID" \
  --rdzv_backend=c10d \
  --rdzv_endpoint="$head:$((20000 + SLURM_JOB_ID % 20000))" \
  main.py "$@"
