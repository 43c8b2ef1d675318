# For CUDA machines: docker build -t mst_train . && docker run --gpus all mst_train train.steps=40
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# Ubuntu's archive has one version of each package: what is pinned today is gone tomorrow.
# hadolint global ignore=DL3008
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1001 trainer
WORKDIR /home/trainer/mst_train
RUN chown trainer:trainer .
USER 1001
ENV VIRTUAL_ENV=/home/trainer/venv PATH=/home/trainer/venv/bin:$PATH
RUN python3 -m venv $VIRTUAL_ENV

# The packages first: they change seldom, and flash-attn takes long to build.
COPY --chown=trainer constraints.txt ./
RUN pip install --constraint constraints.txt torch packaging psutil setuptools wheel ninja
ARG MAX_JOBS=8
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
RUN pip install --no-build-isolation flash-attn==2.8.3.post2

COPY --chown=trainer . .
RUN pip install --constraint constraints.txt --editable '.[train,distributed]'
ENTRYPOINT ["python", "-m", "mst_train"]
