#!/bin/bash
# Honest callers beside hostile ones; see beside_hostile.py, and --help. The build is
# $EINSUMD_BUILD_DIR, by default build/release.
set -euo pipefail
exec python3 "$(dirname "$0")/beside_hostile.py" "$@"
