#!/usr/bin/env bash
# Train on several nodes under SLURM: sbatch --nodes=2 scripts/slurm.sh --cfg configs/X.yaml ...
# Arguments are passed to main.py. Submit from the root of this repository, on a file system that all nodes share.
#
# SLURM starts one process per GPU. Two minutes before the time limit, or at preemption, it sends a signal to all processes.
# They save their state at the same update and exit with status 75; the job is then requeued and resumes from that checkpoint.
#SBATCH --job-name=flatten
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
readonly STOPPED=75 # exit status of main.py if a signal stopped it and its state is saved
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export MASTER_ADDR MASTER_PORT
trap : TERM # SIGTERM must not end this script before its processes have saved their state

status=0
# shellcheck disable=SC2016 # the variables are expanded in each process, not here
# srun does not inherit --cpus-per-task from sbatch. Without the option, all threads of a process would share one core.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=60 bash -c '
  export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
  export LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-${SLURM_STEP_TASKS_PER_NODE%%[(,]*}}" # the latter is, for example, "8(x2)"
  exec python main.py "$@"
' main.py "$@" || status=$?
if [ "$status" -eq "$STOPPED" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
