#!/usr/bin/env bash
# Creates a TPU slice, runs rpt_jax.main on all of its hosts, and deletes the slice:
#
#   bash launch/tpu_pod.sh create          request the slice as a queued resource
#   bash launch/tpu_pod.sh wait            wait until the slice is active
#   bash launch/tpu_pod.sh setup           copy the repository to all hosts, and install it there (see tpu_host.sh)
#   bash launch/tpu_pod.sh run --config=configs/rpt_14b.py --workdir=gs://BUCKET/runs/14b
#                                          start rpt_jax.main on all hosts; restart it after a retryable exit (see again.sh)
#   bash launch/tpu_pod.sh status          show the state of the slice and the processes on each host
#   bash launch/tpu_pod.sh logs [WORKER]   follow the log of a host (default: 0)
#   bash launch/tpu_pod.sh stop            send SIGTERM to the run, which saves a checkpoint and ends
#   bash launch/tpu_pod.sh delete          delete the slice
#
# --dry-run before the command prints the gcloud commands without running them. Settings, in the environment:
#
#   RPT_TPU_NAME     name of the slice (default: rpt)
#   RPT_TPU_ZONE     zone (default: the one in gcloud's configuration)
#   RPT_TPU_TYPE     accelerator type, such as v5p-128 (64 chips) or v6e-64 (default: v6e-64)
#   RPT_TPU_RUNTIME  runtime version of the hosts (default: v2-alpha-tpuv6e, v2-alpha-tpuv5 or v2-alpha-tpuv5-lite, by type)
#   RPT_TPU_SPOT     1 for a spot slice: cheaper, and may be preempted at any time
#   RPT_TPU_SHARE    NFS export, such as 10.0.0.2:/rpt, for a --workdir there and not in a bucket; you become its owner if you
#                    cannot write to it
#   RPT_TPU_MOUNT    directory of every host at which it is mounted (default: /mnt/rpt)
#   RPT_TPU_PORT     port on which process 0 listens; the next port is used as well (default: 8476)
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
name=${RPT_TPU_NAME:-rpt} type=${RPT_TPU_TYPE:-v6e-64} port=${RPT_TPU_PORT:-8476} share=${RPT_TPU_SHARE:-}
mount=${RPT_TPU_MOUNT:-/mnt/rpt}
place=(${RPT_TPU_ZONE:+"--zone=$RPT_TPU_ZONE"})
dry_run=''
[ "${1:-}" != --dry-run ] || { dry_run=1 && shift; }

die() {
    printf 'launch: %s\n' "$1" >&2
    exit 2
}

# Prints a command with shell quoting.
show() {
    local word line=''
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    echo "${line:1}"
}

# Runs a gcloud command, or prints it in a dry run.
gcloud_() {
    if [ "$dry_run" ]; then
        show gcloud "$@"
    else
        command -v gcloud >/dev/null || die "gcloud is not on PATH: install the Google Cloud CLI and log in."
        gcloud "$@"
    fi
}

# Runs the shell command $2 on the workers $1 (a number, or "all").
on_hosts() {
    gcloud_ compute tpus tpu-vm ssh "$name" ${place[@]+"${place[@]}"} "--worker=$1" "--command=$2"
}

runtime() {
    case $type in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        *) die "RPT_TPU_TYPE=$type is not one of v6e-N, v5p-N, v5litepod-N: set RPT_TPU_RUNTIME for another type." ;;
    esac
}

create() {
    local software=${RPT_TPU_RUNTIME:-}
    [ -n "$software" ] || software=$(runtime)
    gcloud_ compute tpus queued-resources create "$name" "--node-id=$name" ${place[@]+"${place[@]}"} \
        "--accelerator-type=$type" "--runtime-version=$software" ${RPT_TPU_SPOT:+--spot}
}

state() {
    gcloud_ compute tpus queued-resources describe "$name" ${place[@]+"${place[@]}"} '--format=value(state.state)'
}

wait_for_slice() {
    local now before=''
    while :; do
        now=$(state)
        [ "$now" = "$before" ] || echo "$now"
        before=$now
        case $now in
            ACTIVE) return ;;
            FAILED | SUSPEND*) die "the slice $name is $now: delete it and create it again, if necessary in another zone." ;;
        esac
        [ -z "$dry_run" ] || return 0
        sleep "${RPT_PAUSE:-30}"
    done
}

set_up_hosts() {
    local archive=rpt_jax.tgz
    # Copy tracked files with their uncommitted changes, and no untracked files.
    if [ "$dry_run" ]; then
        echo "git ls-files -z | tar --null -czf $archive -T -"
    else
        archive=$(mktemp "${TMPDIR:-/tmp}/rpt_jax.XXXXXX")
        (cd -- "$root" && git ls-files -z | tar --null -czf "$archive" -T -)
    fi
    gcloud_ compute tpus tpu-vm scp "$archive" "$name:rpt_jax.tgz" ${place[@]+"${place[@]}"} --worker=all
    [ "$dry_run" ] || rm -f -- "$archive"
    on_hosts all "mkdir -p rpt_jax && tar -xzf rpt_jax.tgz -C rpt_jax && bash rpt_jax/launch/tpu_host.sh\
${share:+ ${share@Q} ${mount@Q}}"
}

run() {
    [ $# -gt 0 ] || die "run needs the arguments of rpt_jax.main, such as --config=configs/rpt_14b.py --workdir=gs://BUCKET/14b."
    local addresses
    addresses=$(gcloud_ compute tpus tpu-vm describe "$name" ${place[@]+"${place[@]}"} \
        '--format=value(networkEndpoints[].ipAddress)')
    if [ "$dry_run" ]; then
        echo "$addresses"
        addresses='FIRST;OTHERS'
    fi
    local hosts=()
    IFS=$';,\n\t ' read -r -d '' -a hosts <<<"$addresses" || true
    [ ${#hosts[@]} -gt 0 ] || die "the slice $name has no hosts: check 'status'."
    local attributes=http://metadata.google.internal/computeMetadata/v1/instance/attributes
    local number="\$(curl -sH Metadata-Flavor:Google $attributes/agent-worker-number)"
    local joint='' count=${#hosts[@]}
    [ -z "$dry_run" ] || count=N
    [ ${#hosts[@]} = 1 ] || joint=" --coordinator=${hosts[0]}:$port --processes=$count --process=$number"
    # Before anything starts: another run would take the file that 'stop' reads.
    on_hosts all "! grep -qs launch/again.sh /proc/\$(cat ~/rpt.pid 2>/dev/null)/cmdline || \
{ echo \"launch: a run is active on \$(hostname); end it first, with 'stop'.\" >&2; exit 2; }"
    # setsid keeps the run alive after the connection closes.
    on_hosts all "cd rpt_jax && { setsid bash -c 'echo \$\$ >~/rpt.pid; exec \"\$@\"' rpt bash launch/again.sh \
bash launch/local.sh$(printf ' %q' "$@")$joint >>~/rpt.log 2>&1 </dev/null & }"
}

case ${1:-} in
    create) create ;;
    wait) wait_for_slice ;;
    setup) set_up_hosts ;;
    run) run "${@:2}" ;;
    status)
        state
        on_hosts all "hostname; pgrep -af '[r]pt_jax.main' || echo 'no run is active'; tail -n 1 ~/rpt.log"
        ;;
    logs) on_hosts "${2:-0}" 'tail -n 50 -f ~/rpt.log' ;;
    stop) on_hosts all "kill -TERM \$(cat ~/rpt.pid)" ;;
    delete) gcloud_ compute tpus queued-resources delete "$name" ${place[@]+"${place[@]}"} --force --quiet ;;
    *) die "'${1:-}' is not one of: create, wait, setup, run, status, logs, stop, delete. The top of this file describes them." ;;
esac
