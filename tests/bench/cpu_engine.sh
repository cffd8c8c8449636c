#!/bin/sh
# The CPU kernels against the machine's memory and OpenBLAS: builds, checks numbers, measures, judges.
#
#   tests/bench/cpu_engine.sh [-t threads] [-r rounds] [-k kernel] [-f]
#
# The last line is `RESULT {...}`; the exit status is 0 if every bar is met. The build lies in
# build/release of the checkout, or where EINSUMD_BUILD_DIR says.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
build=${EINSUMD_BUILD_DIR:-$root/build/release}

fail() {
    echo "cpu_engine.sh: $1" >&2
    echo "RESULT {\"bench\": \"cpu_engine\", \"rows\": [], \"ok\": false, \"error\": \"$1\"}"
    exit 1
}

if ! pkg-config --exists openblas; then
    fail "OpenBLAS is missing (Debian: libopenblas-dev)"
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DEINSUMD_BENCHES=ON &&
       cmake --build "$build" --target cpu_engine --parallel 2; } >"$log" 2>&1; then
    cat "$log" >&2
    fail "the build failed"
fi

# So that OpenBLAS asks the program, and not an environment, how many threads to use.
unset OPENBLAS_NUM_THREADS GOTO_NUM_THREADS OMP_NUM_THREADS
"$build/tests/bench/cpu_engine" "$@"
