#!/bin/bash
# Installs the Debian packages that are missing, and nothing if none is:
#
#     deploy/install-dependencies.sh             what building and running needs
#     deploy/install-dependencies.sh --tests     also what the tests need, and their Python
#                                                packages into build/venv
set -euo pipefail
cd "$(dirname "$0")/.."

build_packages=(
    gcc libc6-dev cmake ninja-build pkg-config
    libgrpc-dev libuv1-dev libjansson-dev zlib1g-dev
    libmicrohttpd-dev libcurl4-openssl-dev
    libprotobuf-c-dev protobuf-c-compiler
    protobuf-compiler libprotobuf-dev # libprotobuf-dev has descriptor.proto and any.proto
)
test_packages=(
    check libopenblas-dev           # unit tests, the benchmarks' baseline
    clang libclang-rt-dev           # libFuzzer and its sanitizers
    clang-format clang-tidy cppcheck shellcheck
    python3 python3-venv prometheus # integration tests; of prometheus, promtool as well
    gnuplot-nox                     # einsumctl bench --plot
)

say() { echo "dependencies: $*"; }

packages=("${build_packages[@]}")
tests=false
case "${1:-}" in
'') ;;
--tests)
    tests=true
    packages+=("${test_packages[@]}")
    ;;
*)
    echo "usage: deploy/install-dependencies.sh [--tests]" >&2
    exit 2
    ;;
esac

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    say "this is no Debian-like system. Install the equivalents of these, then build by hand:" >&2
    printf '    %s\n' "${packages[*]}" >&2
    exit 1
fi

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
    say "all ${#packages[@]} Debian packages are installed"
else
    as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        if ! command -v sudo >/dev/null; then
            say "missing: ${missing[*]}; run this as root, or install sudo" >&2
            exit 1
        fi
        as_root=(sudo)
    fi
    say "installing ${missing[*]}"
    apt_get=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive
        apt-get -qq -o DPkg::Lock::Timeout=120)
    "${apt_get[@]}" update
    "${apt_get[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null
fi

if $tests; then
    # Debian's own Python, for which python3-venv was installed. Rebuilt when the pins change.
    wanted=$(sha256sum <tests/requirements.txt)
    if [ "$(cat build/venv/requirements.sha256 2>/dev/null || true)" = "$wanted" ]; then
        say "the Python packages in build/venv are installed"
    else
        say "installing the Python packages of tests/requirements.txt into build/venv"
        rm -rf build/venv
        mkdir -p build
        /usr/bin/python3 -m venv build/venv
        build/venv/bin/pip install --quiet --requirement tests/requirements.txt
        echo "$wanted" >build/venv/requirements.sha256
    fi
fi
