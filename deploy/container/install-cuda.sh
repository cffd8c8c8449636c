#!/bin/bash
# What of CUDA 13 compiling needs, into /usr/local/cuda, from PyPI, where NVIDIA has it in parts: a
# tenth of the toolkit. For the image's build stage; einsumd links CUDA's runtime statically, so
# none of it is in the image itself.
set -euo pipefail

packages=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85)

apt-get -qq install -y --no-install-recommends g++ python3-venv >/dev/null
python3 -m venv /opt/cuda
/opt/cuda/bin/pip install --quiet "${packages[@]}"
ln -s "$(echo /opt/cuda/lib/python3*/site-packages/nvidia/cu13)" /usr/local/cuda
ln -s lib /usr/local/cuda/lib64
ln -s libcudart.so.13 /usr/local/cuda/lib/libcudart.so # CMake looks for it, though nothing links it
/usr/local/cuda/bin/nvcc --version | tail -1
