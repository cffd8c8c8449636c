#!/bin/bash
# See metrics.py. The build is $EINSUMD_BUILD_DIR, by default build/release; $EINSUMD_BASELINE_DIR may name
# another, whose daemon is measured beside it.
set -euo pipefail
exec python3 "$(dirname "$0")/metrics.py" "$@"
