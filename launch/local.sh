#!/usr/bin/env bash
# Runs rpt_jax.main with the given arguments, in an environment that is made on the first start (see setup.sh):
#
#   bash launch/local.sh --config=configs/rpt_tiny.py --workdir=runs/tiny
#
# Relative paths are relative to the current directory; configs/... falls back to the configs of this repository. The exit code is
# that of rpt_jax.main.
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
set_up 1300 requirements.txt

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# -P: do not import modules from the current directory.
exec "$python" -P -m rpt_jax.main "$@"
