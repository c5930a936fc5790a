#!/usr/bin/env bash
# Runs rpt_jax.main with the same arguments, in an environment that is made on the first start (see setup.sh):
#
#   bash launch/local.sh --config=configs/rpt_tiny.py --workdir=runs/tiny
#
# Relative paths mean the current directory, whichever that is; configs/... means the repository's where there is no
# such file. The exit code is that of rpt_jax.main.
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
set_up 1200 requirements.txt

for argument; do
    shift
    case $argument in
        --config=configs/*)
            [ -e "${argument#--config=}" ] || argument=--config=$root/${argument#--config=}
            ;;
    esac
    set -- "$@" "$argument"
done

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# -P: files of the current directory must not pass for modules.
exec "$python" -P -m rpt_jax.main "$@"
