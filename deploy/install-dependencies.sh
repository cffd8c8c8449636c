#!/bin/bash
# Installs the Debian packages that are missing, and nothing if none is:
#
#     deploy/install-dependencies.sh             what building and running needs
#     deploy/install-dependencies.sh --tests     also what the tests need, and their Python
#                                                packages into build/venv
#     deploy/install-dependencies.sh --packages  also what making and testing Debian packages and
#                                                the container image needs
#     deploy/install-dependencies.sh --torch     as --tests, and torch for the tests of client/python
#                                                into build/torch: 0.8 GB to fetch, 1.6 GB there
set -euo pipefail
cd "$(dirname "$0")/.."

build_packages=(
    gcc libc6-dev cmake ninja-build pkg-config
    libgrpc-dev libuv1-dev libjansson-dev zlib1g-dev libsystemd-dev
    libisal-dev libssl-dev
    libmicrohttpd-dev libcurl4-openssl-dev
    libprotobuf-c-dev protobuf-c-compiler
    protobuf-compiler libprotobuf-dev # libprotobuf-dev has descriptor.proto and any.proto
)
test_packages=(
    check libopenblas-dev           # unit tests, the benchmarks' baseline
    clang libclang-rt-dev           # libFuzzer and its sanitizers
    clang-format clang-tidy cppcheck shellcheck valgrind
    python3 python3-venv prometheus # integration tests; of prometheus, promtool as well
    gnuplot-nox curl                # einsumctl bench --plot; the guides
    libb64-0d                       # perf_analyzer
    python3-dev g++                 # client/python, what torch compiles; C++ callers
    mandoc man-db bash-completion systemd # what is installed
    nginx iproute2                  # test_cluster.py: daemons behind a balancer; test_hostile.py: ss
)
package_packages=(
    dpkg-dev file lintian           # CPack and who judges what it makes
    debootstrap systemd-container   # a Debian to install them on
    buildah docker-compose
)

say() { echo "dependencies: $*"; }

packages=("${build_packages[@]}")
tests=false torch=false
for option in "$@"; do
    case $option in
    --tests | --torch)
        tests=true
        [ "$option" = --tests ] || torch=true
        packages+=("${test_packages[@]}")
        ;;
    --packages) packages+=("${package_packages[@]}") ;;
    *)
        echo "usage: deploy/install-dependencies.sh [--tests|--torch] [--packages]" >&2
        exit 2
        ;;
    esac
done

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
    wanted=$(cat tests/requirements*.txt | sha256sum)
    if [ "$(cat build/venv/requirements.sha256 2>/dev/null || true)" = "$wanted" ]; then
        say "the Python packages in build/venv are installed"
    else
        say "installing the Python packages of tests/requirements*.txt into build/venv"
        rm -rf build/venv
        mkdir -p build
        /usr/bin/python3 -m venv build/venv
        pip=(build/venv/bin/pip install --quiet --use-pep517)
        "${pip[@]}" --requirement tests/requirements.txt
        "${pip[@]}" --no-deps --requirement tests/requirements-alone.txt
        "${pip[@]}" --no-deps --target build/venv/perf_analyzer \
            --requirement tests/requirements-perf-analyzer.txt
        echo "$wanted" >build/venv/requirements.sha256
    fi
fi

if $torch; then
    wanted=$(sha256sum <tests/requirements-torch.txt)
    if [ "$(cat build/torch/requirements.sha256 2>/dev/null || true)" = "$wanted" ]; then
        say "torch in build/torch is installed"
    else
        say "installing torch into build/torch"
        rm -rf build/torch
        build/venv/bin/pip install --quiet --no-deps --target build/torch \
            --requirement tests/requirements-torch.txt
        # torch looks for CUDA's libraries here, where its own packages of them would lie.
        for library in /usr/local/cuda/lib64/*.so.[0-9]* /usr/local/cuda/extras/CUPTI/lib64/*.so.[0-9]*; do
            [ ! -f "$library" ] || ln -sfT "$library" "build/torch/nvidia/cu13/lib/${library##*/}"
        done
        if ! PYTHONPATH=build/torch build/venv/bin/python -c 'import torch'; then
            say "torch does not start here: it needs the libraries of a CUDA 13.0 toolkit in" >&2
            say "/usr/local/cuda. Its tests are skipped without build/torch" >&2
            rm -rf build/torch
            exit 1
        fi
        echo "$wanted" >build/torch/requirements.sha256
    fi
fi
