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
# A run on the GPUs of several nodes, one process a node, submitted from the repository root; options of sbatch before the script
# overrule those above, arguments behind it are those of rpt_jax.main:
#
#   sbatch --nodes=8 launch/slurm_gpu.sh --config=configs/rpt_14b.py --workdir=/shared/runs/14b
#   sbatch --array=0-63 --nodes=1 launch/slurm_gpu.sh --config=configs/score_14b.py --workdir=/shared/omnimath \
#       --config.data.shard=%a/64                       %a is the number in the array: a corpus is prepared in parts
#   bash launch/slurm_gpu.sh --dry-run --config=...     prints what would be run, and runs nothing
#
# Repository, environment (see setup.sh) and --workdir must be on a file system that all nodes share. 300 s before its time is
# over, or where it is preempted, the run saves and the job goes back into the queue; a node that fails is followed by a restart.
#
#   RPT_GRACE      seconds that saving may take (default: 240, less than --signal leaves)
#   RPT_RESTARTS   see again.sh
set -euo pipefail
dry_run=''
[ "${1:-}" != --dry-run ] || { dry_run=1 && shift; }
# sbatch runs a copy of this file from elsewhere.
root=${SLURM_SUBMIT_DIR:-$PWD}
[ -f "$root/launch/setup.sh" ] || {
    echo "launch: $root is not the repository root: submit the job from there." >&2
    exit 2
}
# shellcheck source=launch/setup.sh
. "$root/launch/setup.sh"
# shellcheck source=launch/again.sh
. "$root/launch/again.sh"

set -- "${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# The tasks end by themselves when one of them does, and each with its own exit code.
command=(srun --kill-on-bad-exit=0 "$python" -P -m rpt_jax.main "--config.checkpoint.grace_seconds=${RPT_GRACE:-240}" "$@")
requeue=(scontrol requeue "${SLURM_JOB_ID:-JOB}")
if [ "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    printf '\n# where that ends with 75 because the job has to go:\n'
    printf '%q ' "${requeue[@]}"
    echo
    exit
fi
set_up 1200 requirements.txt
code=0
again "${command[@]}" || code=$?
[ "$code" != 75 ] || "${requeue[@]}"
exit "$code"
