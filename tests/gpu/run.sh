#!/bin/bash
# Builds the CUDA kernels for the card found, checks every number, then times them: about five
# minutes. Needs nvcc 13 and the card's driver, nothing else of this project. What it prints is what
# to send back from a card that the README has no figures for.
#
#     tests/gpu/run.sh [quick | tune] [build folder]
set -eu
mode=${1:-full}
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${2:-$(mktemp -d)}
mkdir -p "$build"
command -v nvcc > /dev/null || PATH=$PATH:/usr/local/cuda/bin

capability=${EINSUMD_GPU_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}
case $capability in
12[01]) target="arch=compute_120f,code=sm_$capability" ;;
89 | 90) target="arch=compute_$capability,code=sm_$capability" ;;
*)
    echo "no kernels for compute capability $capability: 8.9, 9.0, 12.0 and 12.1 have them" >&2
    exit 1
    ;;
esac

pids=
compile() { # source, further flags
    source=$1
    shift
    nvcc -O3 -I"$root" "$@" -c "$root/$source" -o "$build/$(basename "$source").o" &
    pids="$pids $!"
}
for source in attention decode prefill relayout; do
    compile kernels/cuda/$source.cu -std=c++17 -gencode "$target"
done
for source in few hopper hopper_many hopper_some; do
    compile kernels/cuda/$source.cu -std=c++17 -gencode arch=compute_90a,code=sm_90a
done
for source in test_kernels test_attention bench; do
    compile tests/gpu/$source.cu -std=c++17 -gencode "$target"
done
for source in kernels/cuda/table.c kernels/cuda/dispatch.c kernels/cuda/launch.c kernels/reference.c; do
    compile $source -Xcompiler -D_GNU_SOURCE
done
compile kernels/attention.c -Xcompiler -ffp-contract=off
for pid in $pids; do
    wait "$pid"
done
for program in test_kernels test_attention bench; do
    nvcc -o "$build/$program" "$build/$program.cu.o" "$build"/*.c.o \
        "$build"/{attention,decode,few,hopper,hopper_many,hopper_some,prefill,relayout}.cu.o
done

status=0
numbers=
[ "$mode" = full ] || numbers=quick
"$build/test_kernels" $numbers || status=1
"$build/test_attention" $numbers || status=1
# Also of a kernel whose numbers are wrong somewhere: the bench checks what it times.
"$build/bench" "$mode" || status=1
exit $status
