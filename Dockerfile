# The server as an image. For a CPU:
#   docker build -t lingbot-rt .
# For NVIDIA GPUs. torch brings CUDA; the host needs the driver and the NVIDIA container toolkit:
#   docker build -t lingbot-rt:cuda --build-arg TORCH=cuda --build-arg EXTRAS=video,fast,tracing,hopper .
# docs/operations.md has how to run it. BASE is any Debian with Python 3.11 or newer.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
ARG TORCH=cpu
ARG EXTRAS=video,fast,tracing
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv ca-certificates \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/lingbot-rt
ENV PATH=/opt/lingbot-rt/bin:$PATH
WORKDIR /src
COPY scripts/constraints.txt ./
# A layer of its own: it is the largest, and changes only with the version of torch.
RUN case "$TORCH" in \
      cpu) pip install "$(grep ^torch== constraints.txt)+cpu" --extra-index-url "$CPU_INDEX" ;; \
      cuda) pip install "$(grep ^torch== constraints.txt)" ;; \
      *) echo "TORCH=$TORCH: expected cpu or cuda" >&2; exit 2 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY lingbot_rt lingbot_rt
COPY webui webui
RUN pip install --constraint constraints.txt ".[$EXTRAS]" && pip uninstall --yes pip

FROM ${BASE}
ARG TORCH=cpu
# Triton compiles its launchers with a C compiler when a model is compiled for a GPU.
# hadolint ignore=DL3008,SC2046
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 ca-certificates \
      $(if [ "$TORCH" = cuda ]; then echo gcc libc6-dev python3-dev; fi) \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --home-dir /cache --shell /usr/sbin/nologin lingbot \
 && install -d -o lingbot -g lingbot /cache
COPY --from=build /opt/lingbot-rt /opt/lingbot-rt
# All that is written goes to /cache and /tmp, so that the root file system may be read-only.
ENV PATH=/opt/lingbot-rt/bin:$PATH \
    HOME=/cache \
    LINGBOT_RT_HOST=0.0.0.0 \
    LINGBOT_RT_PORT=30000 \
    HF_HOME=/cache/huggingface \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /cache
VOLUME /cache
EXPOSE 30000
# /health answers 503 while the model loads. HEAD: the status is all that is asked for.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 CMD ["python", "-I", "-c", \
  "import os, http.client as h; c = h.HTTPConnection('127.0.0.1', int(os.environ['LINGBOT_RT_PORT']), 4); c.request('HEAD', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["lingbot-rt"]
CMD ["serve"]
