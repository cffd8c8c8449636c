#!/bin/bash
# Packs what a bare GPU machine needs into one folder: daemon, command line tool, GPU tests and benches, and
# the shared libraries that they use, but for the C library's own. It runs on another x86-64 Linux, of
# glibc 2.36 or newer, with nothing but NVIDIA's driver installed:
#
#     deploy/bundle.sh [FOLDER]     by default build/bundle; needs nvcc
#     FOLDER/einsumd --version      on the other machine
#     FOLDER/tests/bench/transport.sh   likewise, if it has Python 3
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
-*)
    echo "usage: deploy/bundle.sh [FOLDER]" >&2
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
here=$(dirname "$(readlink -f "$0")")
LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$here/bin/$(basename "$0")" "$@"
WRAPPER
    chmod +x "$folder/$name"
done | sort -u | grep -vE '/(libc|libm|libpthread|libdl|librt|libresolv|ld-linux[^/]*)\.so' |
    while read -r library; do cp -L "$library" "$folder/lib/"; done

# The benchmark of the whole daemon, where the scripts expect one another.
mkdir -p "$folder/tests/bench" "$folder/tests/integration"
cp tests/bench/{transport.sh,*.py} "$folder/tests/bench/"
cp tests/integration/{daemon.py,copies.py,count_copies.c} "$folder/tests/integration/"
cp build/cuda/proto/services.fds "$folder/"

du -sh "$folder" | awk -v folder="$folder" '{print "bundle: " $1 " in " folder}'
