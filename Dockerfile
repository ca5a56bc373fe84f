# rlcs in a container, for one GPU, many, or none (torch from PyPI brings CUDA with it; the host needs NVIDIA's driver and
# its container toolkit). docs/how-to/container.md shows how to start it.
#   docker build -t rlcs .
#   docker build -t rlcs-vllm --build-arg CONSTRAINTS=/dev/null --build-arg VLLM=vllm==0.33.0 .
FROM python:3.12-slim-bookworm

# The versions with which the tests last passed, or /dev/null: vLLM pins another torch.
ARG CONSTRAINTS=constraints.txt
ARG VLLM=""

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# A compiler for the kernels that torch and Triton build when they first run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/rlcs
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
RUN pip install --no-cache-dir -c "$CONSTRAINTS" ".[chat,quantise,trackers]" ${VLLM:+"$VLLM"}

# Not root; what it downloads and compiles goes to /cache, which can be a volume.
RUN useradd --create-home --uid 1000 rlcs && mkdir -p /cache /work && chown 1000 /cache /work
USER 1000
ENV HF_HOME=/cache/huggingface TORCHINDUCTOR_CACHE_DIR=/cache/torch TRITON_CACHE_DIR=/cache/triton
WORKDIR /work
ENTRYPOINT ["rlcs"]
CMD ["--help"]
