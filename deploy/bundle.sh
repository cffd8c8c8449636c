#!/bin/bash
# Packs what a bare GPU machine needs into one folder: daemon, command line tool, GPU tests and benches, and
# the shared libraries that they use, but for the C library's own. It runs on another x86-64 Linux, of
# glibc 2.36 or newer, with nothing but NVIDIA's driver installed:
#
#     deploy/bundle.sh [--wheels X.Y] [FOLDER]   by default build/bundle; needs nvcc
#     FOLDER/einsumd --version                   on the other machine
#     FOLDER/tests/bench/transport.sh            likewise, if it has Python 3
#     FOLDER/tests/gpu/integration.sh            likewise, if that is Python X.Y: its packages come along
set -euo pipefail
cd "$(dirname "$0")/.."

python=
if [ "${1:-}" = --wheels ] && [[ ${2:-} =~ ^3\.[0-9]+$ ]]; then
    python=$2
    shift 2
fi
case "${1:-}" in
-*)
    echo "usage: deploy/bundle.sh [--wheels X.Y] [FOLDER]" >&2
    exit 2
    ;;
esac
folder=${1:-build/bundle}
programs=(einsumd einsumctl tests/test_engine_cuda tests/test_engine_cpu tests/bench/pipeline
    tests/bench/bare_server tests/regions)

deploy/install-dependencies.sh --tests
cmake --preset cuda >/dev/null
cmake --build build/cuda --target einsumd einsumctl test_engine_cuda test_engine_cpu pipeline bare_server regions

rm -rf "$folder"
mkdir -p "$folder/bin" "$folder/lib"
for program in "${programs[@]}"; do
    name=$(basename "$program")
    cp "build/cuda/$program" "$folder/bin/$name"
    strip "$folder/bin/$name"
    ldd "build/cuda/$program" | awk '$3 ~ /^\// {print $3}'
    # A wrapper, so that nothing of the machine's own set-up is needed.
    cat >"$folder/$name" <<'WRAPPER'
#!/bin/sh
here=$(cd "${0%/*}" && pwd)
LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$here/bin/${0##*/}" "$@"
WRAPPER
    chmod +x "$folder/$name"
done | sort -u | grep -vE '/(libc|libm|libpthread|libdl|librt|libresolv|ld-linux[^/]*)\.so' |
    while read -r library; do cp -L "$library" "$folder/lib/"; done

# The benchmark of the whole daemon and the integration tests, where they expect one another.
mkdir -p "$folder"/tests/{bench,gpu,integration} "$folder"/{server,proto/einsum/v1}
cp tests/bench/{transport.sh,*.py} "$folder/tests/bench/"
cp tests/gpu/integration.sh "$folder/tests/gpu/"
cp tests/pytest.ini "$folder/tests/"
cp tests/integration/*.{py,c} "$folder/tests/integration/"
cp server/config.h "$folder/server/"
cp proto/einsum/v1/einsum.proto "$folder/proto/einsum/v1/"
cp build/cuda/proto/services.fds "$folder/"
if [ -n "$python" ]; then
    grep -E '^(googleapis|grpcio|ml_dtypes|numpy|protobuf|pytest|safetensors)' tests/requirements.txt |
        build/venv/bin/pip download --quiet --only-binary=:all: --python-version "$python" \
            --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
            --platform manylinux2014_x86_64 --dest "$folder/wheels" --requirement /dev/stdin
fi

du -sh "$folder" | awk -v folder="$folder" '{print "bundle: " $1 " in " folder}'
