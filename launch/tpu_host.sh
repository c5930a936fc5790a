#!/usr/bin/env bash
# Prepares a host of a TPU slice: installs Python and a compiler, mounts an NFS export if one is given, and makes the environment,
# with what gs:// needs. `tpu_pod.sh setup` runs it on all hosts:
#
#   bash launch/tpu_host.sh [EXPORT DIRECTORY]      such as 10.0.0.2:/rpt /mnt/rpt
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

# A new host updates itself for some minutes and holds apt's locks meanwhile. apt waits for that of dpkg, but not for that of the
# package lists.
apt() {
    sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=900 "$@"
}

update_package_lists() {
    local attempt
    for attempt in {1..90}; do
        apt update && return
        echo "launch: apt-get update failed (attempt $attempt of 90); next attempt in ${RPT_PAUSE:-10} s" >&2
        sleep "${RPT_PAUSE:-10}"
    done
    die "apt-get update keeps failing; see its messages above."
}

# Ubuntu 22.04, which TPU hosts run, has no Python 3.12, and of 3.11 a release candidate only.
install_packages() {
    update_package_lists
    if ! apt-cache show python3.12 >/dev/null 2>&1; then
        apt install -y software-properties-common
        sudo add-apt-repository -n -y ppa:deadsnakes/ppa
        update_package_lists
    fi
    apt install -y python3.12 python3.12-venv python3.12-dev gcc nfs-common
}

mount_share() {
    sudo mkdir -p "$2"
    mountpoint -q "$2" || sudo mount -t nfs "$1" "$2"
    [ -w "$2" ] || sudo chown "$(id -u):$(id -g)" "$2" || true
    [ -w "$2" ] || die "$(id -un) cannot write to $2: change the owner of $1 on its server."
}

install_packages
[ $# = 0 ] || mount_share "$@"
set_up 1300 requirements.txt
"$python" -m pip install -q -r "$root/requirements/gcs.txt" -r "$root/requirements/tpu.txt"
