#!/bin/bash
# Builds and tests everything:
#
#     tests/run.sh [--quick] [--packages] [--slow] [--fuzz-seconds N]
#
#     dependencies   what is missing is installed; torch too, where a CUDA toolkit is
#     release        build, unit tests (ctest), integration tests (pytest)
#     slow           with --slow: a hundred kills and drains under load, ten minutes of soak
#     packages       what `cmake --install` makes of it: library, man pages, completion, unit
#     asan, tsan     the same under AddressSanitizer with UBSan, and under ThreadSanitizer
#     valgrind       unit tests of the release build under memcheck
#     fuzz           every libFuzzer target for N seconds, 60 by default
#     mutants        the batcher with one bug at a time, each of which a test must find
#     lint           tests/lint.sh
#
# --quick stops after packages. --packages also makes the Debian packages and installs them on a
# Debian 12 that it boots, and builds and runs the container image: minutes more, as root. Logs lie in build/test-logs/. The last line is the count over all:
# "N passed, N failed" and, if any, ", N skipped"; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

quick=false
packages=false
slow=false
fuzz_seconds=60
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=true ;;
    --packages) packages=true ;;
    --slow) slow=true ;;
    --fuzz-seconds)
        fuzz_seconds=${2:-}
        shift
        ;;
    *) fuzz_seconds= ;;
    esac
    [[ $fuzz_seconds =~ ^[1-9][0-9]*$ ]] || {
        echo "usage: tests/run.sh [--quick] [--packages] [--slow] [--fuzz-seconds N]" >&2
        exit 2
    }
    shift
done

logs=build/test-logs
rm -rf "$logs"
mkdir -p "$logs"
passed=0 failed=0 skipped=0
started=$SECONDS

progress() { printf '[%4ds] %s\n' $((SECONDS - started)) "$*"; }

# fail WHAT LOG: counts one failure and shows the end of its log.
fail() {
    failed=$((failed + 1))
    progress "$1: FAILED; the end of $2:"
    tail -60 "$2" | sed 's/^/    /'
}

# count WHAT STATUS JUNIT LOG: adds a JUnit file's counts. A runner that died, ran nothing or failed
# without naming a test must not look like a pass.
count() {
    local what=$1 status=$2 junit=$3 log=$4 result p f s
    if ! result=$(/usr/bin/python3 tests/junit_counts.py "$junit" 2>&1); then
        fail "$what (no result)" "$log"
        return
    fi
    read -r p f s <<<"$result"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    progress "$what: $p passed, $f failed, $s skipped"
    tail -n +2 <<<"$result" | sed 's/^/    /'
    if [ $((p + f)) -eq 0 ]; then
        fail "$what (no test ran)" "$log"
    elif [ "$f" -eq 0 ] && [ "$status" -ne 0 ]; then
        fail "$what (exit status $status)" "$log"
    elif [ "$f" -gt 0 ]; then
        tail -80 "$log" | sed 's/^/    /'
    fi
}

# count_lines WHAT LOG: adds lines of the form "<what> <name>: passed|FAILED|SKIPPED".
count_lines() {
    local what=$1 log=$2 p f s
    p=$(grep -c "^$what [^ ]*: passed" "$log")
    f=$(grep -c "^$what [^ ]*: FAILED" "$log")
    s=$(grep -c "^$what [^ ]*: SKIPPED" "$log")
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    progress "$what: $p passed, $f failed, $s skipped"
    if [ $((p + f)) -eq 0 ]; then
        fail "$what (nothing ran)" "$log"
    elif [ "$f" -gt 0 ]; then
        sed 's/^/    /' "$log"
    else
        grep "^$what " "$log" | sed 's/^/    /'
    fi
}

export ASAN_OPTIONS="detect_stack_use_after_return=1:strict_string_checks=1:check_initialization_order=1"
export LSAN_OPTIONS="suppressions=$PWD/tests/sanitizers/lsan.supp:print_suppressions=0"
export UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1"
# gRPC's and libuv's own synchronisation is not instrumented and would be taken for races.
export TSAN_OPTIONS="ignore_noninstrumented_modules=1:halt_on_error=1:second_deadlock_stack=1"

# ThreadSanitizer of gcc 12 does not start where the kernel randomises more than 28 bits of mmap.
without_aslr=()
if [ "$(cat /proc/sys/vm/mmap_rnd_bits 2>/dev/null || echo 0)" -gt 28 ] && setarch -R true 2>/dev/null; then
    without_aslr=(setarch -R)
fi

# run_preset NAME: build, unit tests, integration tests.
run_preset() {
    local preset=$1 log wrap=()
    [ "$preset" = tsan ] && wrap=("${without_aslr[@]}")

    log=$logs/$preset-build.log
    progress "$preset: building"
    if ! { cmake --preset "$preset" && cmake --build "build/$preset"; } >"$log" 2>&1; then
        fail "$preset build" "$log"
        return
    fi

    log=$logs/$preset-unit.log
    progress "$preset: unit tests"
    "${wrap[@]}" ctest --test-dir "build/$preset" --output-on-failure --no-tests=error -j "$(nproc)" \
        --output-junit "$PWD/$logs/$preset-unit.xml" >"$log" 2>&1
    count "$preset unit" $? "$logs/$preset-unit.xml" "$log"

    log=$logs/$preset-integration.log
    progress "$preset: integration tests"
    # The Python package links a build of its own, in which a sanitizer would see nothing.
    local ignored=()
    [ "$preset" = release ] || ignored=('--ignore-glob=*/test_python_*.py')
    EINSUMD_BUILD_DIR=build/$preset timeout 1800 "${wrap[@]}" build/venv/bin/python -m pytest \
        tests/integration "${ignored[@]}" -m 'not slow' -q -rs -p no:cacheprovider --junitxml "$logs/$preset-integration.xml" \
        >"$log" 2>&1
    count "$preset integration" $? "$logs/$preset-integration.xml" "$log"
}

# run_slow: of the release build.
run_slow() {
    local log=$logs/slow.log
    progress "slow: half an hour"
    EINSUMD_BUILD_DIR=build/release timeout 5400 build/venv/bin/python -m pytest tests/integration \
        -m slow -q -rs -p no:cacheprovider --junitxml "$logs/slow.xml" >"$log" 2>&1
    count slow $? "$logs/slow.xml" "$log"
}

# run_packages: of the release build.
run_packages() {
    local log=$logs/packages.log only=()
    $packages || only=(-m 'not slow')
    progress "packages"
    EINSUMD_BUILD_DIR=build/release timeout 1800 build/venv/bin/python -m pytest tests/packages \
        "${only[@]}" -q -rs -p no:cacheprovider --junitxml "$logs/packages.xml" >"$log" 2>&1
    count packages $? "$logs/packages.xml" "$log"
}

dependencies=(--tests)
$packages && dependencies+=(--packages)
progress "dependencies"
if ! deploy/install-dependencies.sh "${dependencies[@]}" >"$logs/dependencies.log" 2>&1; then
    fail dependencies "$logs/dependencies.log"
else
    # torch comes without CUDA's libraries, which a toolkit has; its tests are skipped without it.
    if [ -e /usr/local/cuda/lib64/libcudart.so ]; then
        progress "dependencies: torch"
        deploy/install-dependencies.sh --torch >>"$logs/dependencies.log" 2>&1 ||
            progress "torch could not be installed, see $logs/dependencies.log"
    fi
    run_preset release
    $slow && run_slow
    run_packages
    if ! $quick; then
        run_preset asan
        run_preset tsan
        progress "valgrind"
        tests/valgrind.sh >"$logs/valgrind.log" 2>&1
        count_lines valgrind "$logs/valgrind.log"
        progress "fuzz: every target for $fuzz_seconds s"
        tests/fuzz/run.sh "$fuzz_seconds" >"$logs/fuzz.log" 2>&1
        count_lines fuzz "$logs/fuzz.log"
        progress "mutants"
        tests/machine/mutants.py >"$logs/mutants.log" 2>&1
        count_lines mutants "$logs/mutants.log"
        progress "lint"
        tests/lint.sh >"$logs/lint.log" 2>&1
        count_lines lint "$logs/lint.log"
    fi
fi

progress "done; logs in $logs"
if [ "$skipped" -gt 0 ]; then
    echo "SKIPPED tests ran nothing and prove nothing; their reasons are above."
fi
$slow || echo "NOT TESTED: hundreds of restarts under load, and the soak; --slow does."
$packages || echo "NOT TESTED: Debian packages and the container image; --packages does."
summary="$passed passed, $failed failed"
[ "$skipped" -gt 0 ] && summary+=", $skipped skipped"
echo "$summary"
[ "$failed" -eq 0 ]
