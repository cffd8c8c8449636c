#!/bin/bash
# Builds the libFuzzer targets and runs each for SECONDS, all side by side:
#
#     tests/fuzz/run.sh [SECONDS]        60 by default
#
# A target starts from corpus/<name>/ in git and keeps what it finds in build/fuzz/finds/<name>/, so
# the next run goes on from there. An input that crashes, leaks, hangs or swells is left in
# build/fuzz/crashes/, and the run fails. Where threads of a daemon run beside the inputs (served,
# below) leaks are looked for at the end alone: while they work libFuzzer takes each input for one.
# And AddressSanitizer keeps less of where memory came from: of a daemon's threads it never ends to
# see new ways. To add what was found to git, merge it first:
#
#     build/fuzz/tests/fuzz/fuzz_<name> -merge=1 tests/fuzz/corpus/<name> build/fuzz/finds/<name>
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=${1:-60}
if ! [[ $seconds =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: tests/fuzz/run.sh [SECONDS]" >&2
    exit 2
fi

[ -f build/fuzz/build.ninja ] || cmake --preset fuzz >/dev/null
cmake --build build/fuzz --target fuzzers

names=()
for source in tests/fuzz/fuzz_*.c; do
    name=${source#tests/fuzz/fuzz_}
    names+=("${name%.c}")
done
mkdir -p build/fuzz/crashes build/fuzz/logs

served=(http http2 shared)
declare -A pids
for name in "${names[@]}"; do
    mkdir -p "build/fuzz/finds/$name"
    options=(-max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1
        -artifact_prefix="build/fuzz/crashes/$name-")
    asan_options=${ASAN_OPTIONS:-}
    if [[ " ${served[*]} " == *" $name "* ]]; then
        options+=(-detect_leaks=0)
        asan_options+=:quarantine_size_mb=64:malloc_context_size=4
    fi
    [ -f "tests/fuzz/$name.dict" ] && options+=(-dict="tests/fuzz/$name.dict")
    ASAN_OPTIONS=$asan_options "build/fuzz/tests/fuzz/fuzz_$name" "${options[@]}" \
        "build/fuzz/finds/$name" "tests/fuzz/corpus/$name" >"build/fuzz/logs/$name.log" 2>&1 &
    pids[$name]=$!
done
# An interrupted run leaves no fuzzer behind.
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM

failed=0
for name in "${names[@]}"; do
    log=build/fuzz/logs/$name.log
    if wait "${pids[$name]}"; then
        executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        edges=$(grep -o 'cov: [0-9]*' "$log" | tail -1 | cut -d' ' -f2)
        inputs=$(grep -o 'corp: [0-9]*' "$log" | tail -1 | cut -d' ' -f2)
        echo "fuzz $name: passed, ${executions:-0} executions, ${edges:-0} edges covered," \
            "${inputs:-0} inputs"
    else
        echo "fuzz $name: FAILED; the end of $log:"
        tail -40 "$log"
        failed=$((failed + 1))
    fi
done
exit $((failed > 0))
