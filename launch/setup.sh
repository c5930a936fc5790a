# shellcheck shell=bash
# Sourced by the launchers. set_up makes the virtual environment that the given files of requirements describe, where it is
# missing or out of date; afterwards $python runs in it. Settings:
#
#   PYTHON    the interpreter to build on (default: the best of those on PATH, see below)
#   RPT_VENV  where the environment lives (default: .venv in the repository root)
#
# CPU or accelerator. requirements.txt asks for plain jax, which runs on the CPU. Where one of the interpreters on PATH,
# an activated virtual environment's included, already has JAX with the plugin of an accelerator (CUDA, ROCm or TPU),
# that interpreter is taken before all others, and its packages stay visible from the new environment: pip finds JAX
# there, is held to exactly that version, and adds only what is missing. To put an accelerator's JAX into a finished
# environment instead: .venv/bin/pip install "jax[cuda13]<0.13" (or jax[tpu]); later updates leave it in place.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${RPT_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
python=$venv/bin/python
# What the environment was completed from, a line for each file; "incomplete" from its first moment until everything is
# installed.
stamp=$venv/requirements.stamp
constraints=$venv/constraints.txt

die() {
    printf 'launch: %s\n' "$1" >&2
    exit 1
}

# jax_plugins is the namespace in which JAX itself looks for CUDA and ROCm; a TPU it finds by libtpu.
has_accelerator='find_spec("jax") and (find_spec("jax_plugins") or find_spec("libtpu"))'

# Ranks the interpreter that runs it: 0 too old, 1 cannot make virtual environments, 2 can, 3 has an accelerator's JAX.
# Every Python must be able to run it. Files in the current directory must not pass for modules.
probe='
import sys
sys.path = [entry for entry in sys.path if entry]
rank = 0
if sys.version_info >= (3, 11):
    from importlib.util import find_spec
    rank = 3 if '$has_accelerator' else 2 if find_spec("ensurepip") else 1
print("%d %d.%d" % ((rank,) + sys.version_info[:2]))
'

# Shows the packages of the interpreter that runs it to the environment argv[1]. The option --system-site-packages of
# venv would show the packages of the system where that interpreter is itself a virtual environment.
share='
import glob, sys
[packages] = glob.glob(glob.escape(sys.argv[1]) + "/lib/python3*/site-packages")
with open(packages + "/accelerator.pth", "w") as file:
    print(*(entry for entry in sys.path if entry.endswith("-packages")), sep="\n", file=file)
'

# Unconstrained, pip would hide an accelerator's JAX that requirements.txt does not allow behind one for the CPU.
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
    # An activated environment must not be rebuilt from its own interpreter.
    local PATH=":$PATH:"
    PATH=${PATH//":$venv/bin:"/:}
    PATH=${PATH#:}
    PATH=${PATH%:}
    rank=-1
    for name in "${candidates[@]}"; do
        answer=$("$name" -c "$probe" 2>/dev/null) || continue
        if [ "${answer%% *}" -gt "$rank" ]; then
            base=$(command -v -- "$name") rank=${answer%% *} version=${answer##* }
        fi
    done
    [ "$rank" != -1 ] \
        || die "no Python found as ${candidates[*]}: install Python 3.11 or newer, or set PYTHON=/path/to/python."
    [ "$rank" != 0 ] || die "$base is Python $version: install Python 3.11 or newer, or set PYTHON=/path/to/python."
}

# Ends the launch with one sentence on a step ($1) that failed, judged by what it printed ($2).
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
            reason="no versions of the packages satisfy requirements.txt${held:+ beside the installed $held, which has\
 an accelerator plugin}; update what is installed, or set PYTHON=/path/to/python"
            ;;
        *'Failed building wheel'* | *'Failed to build'*)
            reason="a package could not be compiled; install a C compiler and the headers of Python (on Debian and\
 Ubuntu: apt install gcc python3-dev)"
            ;;
        *'connection broken'* | *'connection error'* | *'Max retries'* | *'timed out'* | *SSLError* | *IncompleteRead*)
            reason="the package index cannot be reached; check the network and the proxy settings, then start again"
            ;;
        *) reason=${2##*$'\n'} ;;
    esac
    die "$1 failed: ${reason%.}.${log:+ All output is in $log.}"
}

make_environment() {
    local output free parent=${venv%/*}
    find_python
    free=$(df -Pk "$parent/" 2>/dev/null | sed -n 's/.* \([0-9][0-9]*\)  *[0-9][0-9]*% .*/\1/p')
    [ -z "$free" ] || [ $((free / 1024)) -ge "$needed_mb" ] \
        || die "$parent has $((free / 1024)) MB of free disk space and the packages need about $needed_mb MB: free\
 some, or set RPT_VENV to a directory on a larger disk."
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
    echo "launch: installing ${names[*]} into $venv (a new environment takes $size_mb MB and one to two minutes)" >&2
    "$python" -P -c "$constrain" >"$constraints" || die "cannot write to $constraints."
    output=$("$python" -P -m pip install --no-input --disable-pip-version-check --progress-bar off \
        "${flags[@]}" -c "$constraints" 2>&1) || explain "installing the packages" "$output"
    "$python" -P -c "$fingerprint" "${requirements[@]}" >"$stamp" || die "cannot write to $stamp."
}

# Arguments: the MB that a new environment takes, and the files of requirements, relative to the repository root.
set_up() {
    local size_mb=$1 needed_mb=$(($1 + 300)) names=("${@:2}") requirements=() flags=() name
    for name in "${names[@]}"; do
        requirements+=("$root/$name") flags+=(-r "$root/$name")
    done
    ! is_complete || return 0
    { mkdir -p -- "${venv%/*}/" && [ -w "${venv%/*}/" ]; } 2>/dev/null || die "cannot write to ${venv%/*}/."
    # Two launches at once would delete each other's half-made environment. macOS has no flock: there, do not do that.
    (
        if command -v flock >/dev/null && ! flock -n 9; then
            echo "launch: waiting for another set-up of $venv to end" >&2
            flock 9
        fi
        ! is_complete || exit 0
        if [ "$(cat -- "$stamp" 2>/dev/null)" = incomplete ] \
            || ! "$python" -P -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            # Only an environment that carries the stamp is ever deleted.
            [ ! -e "$venv" ] || [ -e "$stamp" ] || rmdir -- "$venv" 2>/dev/null \
                || die "$venv is no virtual environment of Python 3.11 or newer with pip: remove it, or set RPT_VENV."
            make_environment
        fi
        install_requirements
    ) 9>"$venv.lock" || exit
}
