#!/usr/bin/env bash
# Runs one command on all hosts of a SLURM job, one process per node (or per GPU).
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/pod/slurm.sh \
#       launch/train.py --config configs/jodiffusion.py --workdir /shared/runs/jodiffusion
#   sbatch --nodes=4 launch/pod/slurm.sh launch/sample.py --workdir /shared/runs/r --out /shared/pairs
#
# The processes find one another through SLURM's own variables. The workdir must be on a file system
# that all nodes share. Every node gets what sbatch asked for; --ntasks-per-node=8 together with
# --gpus-per-task=1 gives one process per GPU.
#
# A time limit or a preemption sends SIGTERM: the run saves on all nodes at one step and exits with
# 75. That, and a node that died, puts the job back into the queue, where the same command goes on
# from the newest checkpoint; a mistake in config or data (status 2) does not.
#
# Environment: PYTHON (default: python), TRIES (default: 10 restarts of one job).

#SBATCH --job-name=jointseg
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

if [ $# -eq 0 ]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 2
fi

status=0
srun --kill-on-bad-exit=0 "${PYTHON:-python}" "$@" || status=$?

case $status in
  0 | 1 | 2) exit "$status" ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -lt "${TRIES:-10}" ]; then
  echo "slurm.sh: status $status; job ${SLURM_JOB_ID:-?} goes back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
