# syntax=docker/dockerfile:1
# docker build -t mdm-prime .                                  CPU
# docker build -t mdm-prime:gpu --build-arg TORCH_VARIANT=cu130 .   CUDA (any variant with wheels for TORCH_VERSION)

ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS builder
ARG TORCH_VERSION=2.13.0
ARG TORCH_VARIANT=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
# torch has its own layer: it is large and changes rarely. The local version (+cpu) names the build, so that a
# variant without wheels is an error and never a silent download of another one.
RUN /opt/venv/bin/pip install --extra-index-url "https://download.pytorch.org/whl/${TORCH_VARIANT}" "torch==${TORCH_VERSION}+${TORCH_VARIANT}"
WORKDIR /src
COPY . .
RUN echo "torch==${TORCH_VERSION}+${TORCH_VARIANT}" > /opt/constraints.txt
RUN /opt/venv/bin/pip install --constraint /opt/constraints.txt '.[otel]'

FROM python:${PYTHON_VERSION}-slim AS runtime
ARG TORCH_VARIANT=cpu
# Triton builds its launchers with a C compiler when a kernel first runs; the CPU image needs none.
RUN if [ "${TORCH_VARIANT}" != cpu ]; then apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; fi
RUN useradd --create-home --uid 10001 prime
COPY --from=builder /opt/venv /opt/venv
# Compiled kernels go where a container with a read-only file system can write; files there must be executable.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PRIME_HOST=0.0.0.0 PRIME_PORT=8000 TRITON_CACHE_DIR=/tmp/triton
USER prime
WORKDIR /home/prime
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['PRIME_PORT'] + '/health', timeout=4)"]
CMD ["prime-serve"]
