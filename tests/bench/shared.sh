#!/bin/bash
# See shared.py. The build is $EINSUMD_BUILD_DIR, by default build/release.
set -euo pipefail
exec python3 "$(dirname "$0")/shared.py" "$@"
