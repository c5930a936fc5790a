# shellcheck shell=bash
# Sourced by the other scripts. `set_up` makes the virtual environment that the given requirements files describe, or updates it
# if it is out of date; afterwards $python is its interpreter. Settings:
#
#   PYTHON    the interpreter to build on (default: the best one on PATH, see below)
#   RPT_VENV  directory of the environment (default: .venv in the repository root)
#
# CPU or accelerator: requirements.txt lists plain jax, which runs on the CPU. If an interpreter on PATH, for example that of an
# activated environment, already has JAX with an accelerator plugin (CUDA, ROCm or TPU), the environment is built on that
# interpreter and shares its packages: pip keeps that exact version of JAX and adds only what is missing. To install an
# accelerator's JAX into a finished environment instead: .venv/bin/pip install -r requirements/cuda.txt (or tpu.txt). Later
# updates keep it.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${RPT_VENV:-$root/.venv}
venv=${venv%/}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
python=$venv/bin/python
# One line for each requirements file that has been installed, or "incomplete" while the environment is being made.
stamp=$venv/requirements.stamp
constraints=$venv/constraints.txt

die() {
    printf 'launch: %s\n' "$1" >&2
    exit 1
}

# JAX finds CUDA and ROCm in the namespace package jax_plugins, and a TPU by libtpu.
has_accelerator='find_spec("jax") and (find_spec("jax_plugins") or find_spec("libtpu"))'

# Ranks the interpreter that runs it: 0 too old or not released, 1 without venv, 2 with venv, 3 with an accelerator's JAX. It must run on every
# version of Python, and must not import modules from the current directory.
probe='
import sys
sys.path = [entry for entry in sys.path if entry]
rank = 0
if sys.version_info >= (3, 11) and sys.version_info[3] == "final":
    from importlib.util import find_spec
    rank = 3 if '$has_accelerator' else 2 if find_spec("ensurepip") else 1
level = "" if sys.version_info[3] == "final" else " (pre-release)"
print("%d %d.%d%s" % ((rank,) + sys.version_info[:2] + (level,)))
'

# Makes the packages of the interpreter that runs it visible in the environment argv[1]. If that interpreter belongs to a virtual
# environment itself, venv's option --system-site-packages would share the system's packages instead.
share='
import glob, sys
[packages] = glob.glob(glob.escape(sys.argv[1]) + "/lib/python3*/site-packages")
with open(packages + "/accelerator.pth", "w") as file:
    print(*(entry for entry in sys.path if entry.endswith("-packages")), sep="\n", file=file)
'

# Pins an accelerator's JAX. Without the pin, pip would install a CPU build over a version that requirements.txt does not allow.
constrain='
from importlib.metadata import version
from importlib.util import find_spec
if '$has_accelerator':
    print("jax==" + version("jax"), "jaxlib==" + version("jaxlib"), sep="\n")
'

fingerprint='
import hashlib, sys
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        print("python%d.%d" % sys.version_info[:2], hashlib.sha256(file.read()).hexdigest())
'

is_complete() {
    local now line installed
    now=$("$python" -P -c "$fingerprint" "${requirements[@]}" 2>/dev/null) || return
    installed=$'\n'$(cat -- "$stamp" 2>/dev/null)$'\n'
    while read -r line; do
        [[ $installed = *$'\n'"$line"$'\n'* ]] || return
    done <<<"$now"
}

# Sets $base, the first interpreter of the highest rank, and $rank.
find_python() {
    local candidates=(python3.13 python3.12 python3.11 python3 python) name answer version
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    # Do not rebuild an activated environment with its own interpreter.
    local PATH=":$PATH:"
    PATH=${PATH//":$venv/bin:"/:}
    PATH=${PATH#:}
    PATH=${PATH%:}
    rank=-1
    for name in "${candidates[@]}"; do
        answer=$("$name" -c "$probe" 2>/dev/null) || continue
        if [ "${answer%% *}" -gt "$rank" ]; then
            base=$(command -v -- "$name") rank=${answer%% *} version=${answer#* }
        fi
    done
    [ "$rank" != -1 ] \
        || die "no Python found as ${candidates[*]}: install Python 3.11 or newer, or set PYTHON=/path/to/python."
    [ "$rank" != 0 ] || die "$base is Python $version: install Python 3.11 or newer, or set PYTHON=/path/to/python."
}

# Exits with one sentence about the step $1, which failed with the output $2.
explain() {
    local reason log=$venv/setup.log held=''
    printf '%s\n' "$2" 2>/dev/null >"$log" || log=''
    case $2 in
        *'No space left on device'* | *'Disk quota exceeded'*)
            reason="the disk is full; free about $needed_mb MB in $venv and in ${TMPDIR:-/tmp}, or set RPT_VENV and\
 TMPDIR to directories on a larger disk"
            ;;
        *'ensurepip is not available'* | *'No module named ensurepip'* | *"No module named 'ensurepip'"*)
            reason="it lacks ensurepip; install that (on Debian and Ubuntu: apt install python3-venv), or set\
 PYTHON=/path/to/python"
            ;;
        *ResolutionImpossible*)
            held=$(head -n 1 "$constraints")
            reason="no versions of the packages satisfy requirements.txt${held:+ together with the installed $held, which\
 has an accelerator plugin}; update that installation, or set PYTHON=/path/to/python"
            ;;
        *'Failed building wheel'* | *'Failed to build'*)
            reason="a package could not be compiled; install a C compiler and Python's headers (on Debian and Ubuntu:\
 apt install gcc python3-dev)"
            ;;
        *'connection broken'* | *'connection error'* | *'Max retries'* | *'timed out'* | *SSLError* | *IncompleteRead*)
            reason="the package index cannot be reached; check the network and the proxy settings, then try again"
            ;;
        *) reason=${2##*$'\n'} ;;
    esac
    die "$1 failed: ${reason%.}.${log:+ The full output is in $log.}"
}

make_environment() {
    local output free parent=${venv%/*}
    find_python
    free=$(df -Pk "$parent/" 2>/dev/null | sed -n 's/.* \([0-9][0-9]*\)  *[0-9][0-9]*% .*/\1/p')
    [ -z "$free" ] || [ $((free / 1024)) -ge "$needed_mb" ] \
        || die "$parent has $((free / 1024)) MB of free disk space, but the packages need about $needed_mb MB: free\
 some space, or set RPT_VENV to a directory on a larger disk."
    rm -rf -- "$venv"
    { mkdir -- "$venv" && echo incomplete >"$stamp"; } 2>/dev/null || die "cannot write to $venv."
    output=$("$base" -P -m venv -- "$venv" 2>&1) || explain "making a virtual environment with $base" "$output"
    if [ "$rank" = 3 ]; then
        echo "launch: using the accelerator's JAX of $base" >&2
        output=$("$base" -P -c "$share" "$venv" 2>&1) || explain "sharing the JAX of $base" "$output"
    fi
}

install_requirements() {
    local output
    echo "launch: installing ${names[*]} into $venv (a new environment takes $size_mb MB and a few minutes)" >&2
    "$python" -P -c "$constrain" >"$constraints" || die "cannot write to $constraints."
    output=$("$python" -P -m pip install --no-input --disable-pip-version-check --progress-bar off \
        "${flags[@]}" -c "$constraints" 2>&1) || explain "installing the packages" "$output"
    "$python" -P -c "$fingerprint" "${requirements[@]}" >"$stamp" || die "cannot write to $stamp."
}

# Arguments: the size of a new environment in MB, and the requirements files, relative to the repository root.
set_up() {
    local size_mb=$1 needed_mb=$(($1 + 300)) names=("${@:2}") requirements=() flags=() name
    for name in "${names[@]}"; do
        requirements+=("$root/$name") flags+=(-r "$root/$name")
    done
    ! is_complete || return 0
    { mkdir -p -- "${venv%/*}/" && [ -w "${venv%/*}/" ]; } 2>/dev/null || die "cannot write to ${venv%/*}/."
    # The lock keeps two launches from deleting each other's unfinished environment. macOS has no flock: there, do not start
    # two at once.
    (
        if command -v flock >/dev/null && ! flock -n 9; then
            echo "launch: waiting until another process has set up $venv" >&2
            flock 9
        fi
        ! is_complete || exit 0
        if [ "$(cat -- "$stamp" 2>/dev/null)" = incomplete ] \
            || ! "$python" -P -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            # Only a directory with the stamp is ever deleted.
            [ ! -e "$venv" ] || [ -e "$stamp" ] || rmdir -- "$venv" 2>/dev/null \
                || die "$venv is not a virtual environment of Python 3.11 or newer with pip: remove it, or set RPT_VENV."
            make_environment
        fi
        install_requirements
    ) 9>"$venv.lock" || exit
}
