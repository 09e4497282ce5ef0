# nnssl and nnU-Net in one image; the base decides between CPU and CUDA:
#   docker build -t nnssl .
#   docker build -t nnssl:cuda --build-arg BASE=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime .
# How to run it: docs/docker.md.
ARG BASE=python:3.12-slim
FROM ${BASE}

# PyTorch's CPU wheels where the base brings no PyTorch; a base with PyTorch keeps its own.
ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# libgomp1 is what PyTorch and scikit-learn link against on slim images.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
RUN python3 -c "import torch" 2>/dev/null || pip install torch --index-url ${TORCH_INDEX}

WORKDIR /opt/nnssl
COPY . .
RUN pip install .
RUN pip install '.[dicom]'

ENV nnUNet_raw=/data/nnUNet_raw nnUNet_preprocessed=/data/nnUNet_preprocessed nnUNet_results=/data/nnUNet_results
# Weights & Biases, matplotlib and torch write below HOME; any user may be chosen with docker run --user.
ENV HOME=/tmp
WORKDIR /data
CMD ["nnssl_pretrain", "--help"]
