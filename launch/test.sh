#!/usr/bin/env bash
# Runs the tests in an environment that is made on the first start (see setup.sh). Arguments go to pytest, and paths are
# those of the repository:
#
#   bash launch/test.sh                       everything but the slow tests
#   bash launch/test.sh -m slow -n 0          the slow tests, one after the other: some measure
#   bash launch/test.sh tests/test_reward.py  one file
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
set_up 2100 requirements.txt tests/requirements.txt
cd -- "$root"
exec "$python" -m pytest "$@"
