#!/bin/bash
# Everything about our code that can be judged without running it. One line a check, the findings
# below it; fails if any check does. clang-tidy reads build/release/compile_commands.json, so build
# that preset first.
# shellcheck disable=SC2317 # the functions are called by name, through check
set -uo pipefail
cd "$(dirname "$0")/.." || exit

jobs=$(nproc)
# What clang-tidy says about findings that it does not show.
noise='^[0-9]+ warnings? (generated|and)|^Suppressed |^Use -(header-filter|system-headers)'
failed=0

# check NAME COMMAND...: runs it, and shows its output only if it failed.
check() {
    local name=$1 output
    shift
    if output=$("$@" 2>&1); then
        echo "lint $name: passed"
    else
        echo "lint $name: FAILED"
        printf '%s\n' "$output" | grep -vE "$noise" | head -200
        failed=$((failed + 1))
    fi
}

skip() {
    echo "lint $1: SKIPPED: $2"
}

# Tracked and not yet tracked, but nothing that git ignores.
sources() {
    git ls-files --cached --others --exclude-standard -- "$@" | sort -u |
        while read -r file; do if [ -s "$file" ]; then echo "$file"; fi; done
}

format() {
    sources '*.c' '*.h' '*.cu' '*.cuh' | xargs clang-format --dry-run -Werror
}

# Our files among those that the release preset compiles; the rest is generated.
compiled_sources() {
    /usr/bin/python3 - <<'PYTHON'
import json, os
with open("build/release/compile_commands.json") as commands:
    files = {os.path.relpath(os.path.join(c["directory"], c["file"])) for c in json.load(commands)}
print("\n".join(sorted(f for f in files if f.endswith(".c") and not f.startswith(("build", "..")))))
PYTHON
}

# The compile commands are gcc's; clang may not know all of its warnings.
tidy() {
    compiled_sources | xargs -P "$jobs" -n 3 clang-tidy --quiet -p build/release \
        --extra-arg=-Wno-unknown-warning-option
}

cppcheck_ours() {
    sources 'server/*.c' 'kernels/*.c' 'client/*.c' |
        xargs cppcheck --quiet -j "$jobs" --std=c11 --language=c --error-exitcode=1 --inline-suppr \
            --enable=warning,performance,portability \
            --suppressions-list=tests/cppcheck.suppressions \
            -D_GNU_SOURCE -DEINSUMD_VERSION='"0"' -D__x86_64__ -I .
}

shell() {
    sources '*.sh' '.ci/run' 'deploy/package/p*' | xargs shellcheck &&
        sources 'deploy/completion/*' | xargs shellcheck --shell=bash
}

# What the CUDA kernels for SM 12.0 compile to.
cuda_static() {
    CUOBJDUMP=$(find "$PWD/build/venv" -path '*/bin/cuobjdump' -type f | head -1) tests/gpu/check_static.sh
}

proto() {
    build/venv/bin/buf lint --path proto/einsum --config tests/buf.yaml
}

python_types() {
    build/venv/bin/mypy --cache-dir build/mypy --config-file client/python/pyproject.toml client/python/einsumd
}

check clang-format format
if [ -f build/release/compile_commands.json ]; then
    check clang-tidy tidy
else
    skip clang-tidy "build/release has no compile_commands.json; build the release preset first"
fi
check cppcheck cppcheck_ours
check shellcheck shell
if [ -x build/venv/bin/buf ]; then
    check buf proto
else
    skip buf "build/venv has no buf; run deploy/install-dependencies.sh --tests"
fi
if [ -x build/venv/bin/mypy ]; then
    check mypy python_types
else
    skip mypy "build/venv has no mypy; run deploy/install-dependencies.sh --tests"
fi
if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
    check cuda_static cuda_static
else
    skip cuda_static "no nvcc (CUDA 13): the image for SM 12.0 is not looked at"
fi
exit $((failed > 0))
