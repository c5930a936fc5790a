#!/usr/bin/env bash
#SBATCH --job-name=rpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=rpt-%j.log
# Runs rpt_jax.main on the GPUs of several nodes, with one process per node. Submit it from the repository root. Options of
# sbatch go before the script and override those above; arguments after the script go to rpt_jax.main:
#
#   sbatch --nodes=8 launch/slurm_gpu.sh --config=configs/rpt_14b.py --workdir=/shared/runs/14b
#   sbatch --array=0-63 --nodes=1 launch/slurm_gpu.sh --config=configs/score_14b.py --workdir=/shared/omnimath \
#       --config.data.shard=%a/64                     prepare a corpus in 64 shards; %a is the index in the job array
#   bash launch/slurm_gpu.sh --dry-run --config=...     print the commands without running them
#
# The repository, the environment (see setup.sh) and --workdir must be on a file system that all nodes share. 300 s before the
# time limit, the run saves a checkpoint and the job is requeued; after the failure of a node the run restarts. To make a job do
# so at any other time: scancel --batch --signal=TERM JOB. scancel JOB ends it for good.
#
#   RPT_GRACE      seconds that saving may take (default: 240; must be less than the time that --signal leaves)
#   RPT_RESTARTS   see again.sh
set -euo pipefail
dry_run=''
[ "${1:-}" != --dry-run ] || { dry_run=1 && shift; }
# sbatch runs a copy of this file from another directory.
root=${SLURM_SUBMIT_DIR:-$PWD}
[ -f "$root/launch/setup.sh" ] || {
    echo "launch: $root is not the repository root: submit the job from there." >&2
    exit 2
}
# shellcheck source=launch/setup.sh
. "$root/launch/setup.sh"
# shellcheck source=launch/again.sh
. "$root/launch/again.sh"

# srun ends its tasks at once when it receives SIGTERM, but passes SIGUSR1 on to them, which makes the run save and end.
stop_command() {
    kill -USR1 "$1" 2>/dev/null
}

set -- "${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# --kill-on-bad-exit=0: when one process ends, the others end by themselves and report why. srun does not take the number of CPUs
# from the job.
command=(srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}
    "$python" -P -m rpt_jax.main "--config.checkpoint.grace_seconds=${RPT_GRACE:-240}" "$@")
requeue=(scontrol requeue "${SLURM_JOB_ID:-JOB}")
if [ "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    printf '\n# if the job was asked to stop before the run was complete:\n'
    printf '%q ' "${requeue[@]}"
    echo
    exit
fi
set_up 1300 requirements.txt
code=0
again "${command[@]}" || code=$?
# A run that was stopped has saved a checkpoint (75), or ended by the signal because it had nothing to save yet. A job that was
# canceled or preempted receives SIGTERM as well, but is not running any more: Slurm decides what becomes of it.
state=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID") || true
case ${stopping:+stopped}$code$state in
    stopped75RUNNING | stopped1[2-9][0-9]RUNNING)
        echo "launch: job $SLURM_JOB_ID goes back to the queue, to resume later" >&2
        "${requeue[@]}"
        ;;
esac
exit "$code"
