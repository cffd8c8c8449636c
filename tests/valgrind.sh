#!/bin/bash
# Unit tests under valgrind's memcheck, of the release build: what no sanitizer sees is memory that was
# never written and is decided by. One line a test, "valgrind <name>: passed|FAILED".
set -uo pipefail
cd "$(dirname "$0")/.." || exit

build=${EINSUMD_BUILD_DIR:-build/release}
# Of the tests those that take seconds; what the others are about, a daemon under memcheck is asked
# for by integration/test_valgrind.py.
tests=(metrics trace safetensors rope selftest job inference health supervisor reflection labour suspects connections)

command -v valgrind >/dev/null || {
    echo "valgrind tests: SKIPPED: not installed (deploy/install-dependencies.sh --tests)"
    exit
}

run() {
    local log=$build/valgrind-$1.log
    if timeout 300 valgrind --quiet --error-exitcode=99 --leak-check=full --show-leak-kinds=definite \
        --errors-for-leak-kinds=definite \
        "$build/tests/test_$1" >"$log" 2>&1; then
        echo "valgrind $1: passed"
    else
        echo "valgrind $1: FAILED"
        tail -40 "$log" | sed 's/^/    /'
    fi
}
export build CK_DEFAULT_TIMEOUT=${CK_DEFAULT_TIMEOUT:-240}
export -f run

printf '%s\n' "${tests[@]}" | xargs -P "$(nproc)" -I{} bash -c 'run {}' | sort >"$build/valgrind.log"
cat "$build/valgrind.log"
! grep -q FAILED "$build/valgrind.log"
