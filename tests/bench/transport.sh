#!/bin/bash
# The daemon's road around the kernel beside gRPC alone, and beside the servers that one would write
# instead; see transport.py, and --help. Runs from a checkout (build/release, or where
# EINSUMD_BUILD_DIR says) and from a folder that deploy/bundle.sh has packed.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
root=$(readlink -f "$here/../..")
if [ -z "${EINSUMD_BUILD_DIR:-}" ] && [ -x "$root/bin/einsumd" ]; then
    export EINSUMD_BUILD_DIR=$root # a bundle
fi
exec python3 "$here/transport.py" "$@"
