#!/bin/bash
# Ten minutes of everything at once against one daemon: unary calls, a stream, OutputProject, the
# Open Inference Protocol, a ring in shared memory, cancels, nonsense, loads and unloads, SIGHUP,
# scrapes. Fails if an answer is wrong, a call fails that must not, the process grows, or its p99
# drifts.
#
#     tests/soak.sh [--seconds N] [--drift PERCENT] [--json FILE]
#
# Needs a build (EINSUMD_BUILD_DIR, default build/release) and build/venv
# (deploy/install-dependencies.sh --tests).
set -euo pipefail
cd "$(dirname "$0")/.."
exec build/venv/bin/python tests/integration/soak.py "$@"
