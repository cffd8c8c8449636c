#!/bin/bash
# More than can be computed, offered all the same; see overload.py, and --help. The build is
# $EINSUMD_BUILD_DIR, by default build/release.
set -euo pipefail
exec python3 "$(dirname "$0")/overload.py" "$@"
