#!/usr/bin/env bash
# Runs the tests in an environment that is made on the first start (see setup.sh). Arguments go to pytest, and paths are relative
# to the repository root:
#
#   bash launch/test.sh                         all tests except the slow ones
#   bash launch/test.sh -m slow -n 0            the slow tests, one at a time, because some measure speed
#   bash launch/test.sh tests/test_convert.py   one file
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
set_up 2300 requirements.txt tests/requirements.txt
cd -- "$root"
exec "$python" -m pytest "$@"
