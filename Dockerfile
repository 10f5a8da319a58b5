# Three images from one file: docker build --target api|worker|sender .
#
#   BASE         a Debian with Python 3.11 or newer; python3 is installed where it is missing
#   WHEELS       a folder of wheels in the build context, given to pip as --find-links
#   OFFLINE=1    no package index at all: everything comes from WHEELS
#   TORCH_INDEX  an extra index for torch, e.g. https://download.pytorch.org/whl/cpu; without it torch is PyPI's CUDA build
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS base
# ca-certificates: webhooks and object stores are spoken to over TLS.
RUN if ! command -v python3 >/dev/null || [ ! -e /etc/ssl/certs/ca-certificates.crt ]; then \
      apt-get update \
      && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 ca-certificates \
      && apt-get clean && rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
      && find /usr -xdev -type d -name __pycache__ -prune -exec rm -rf {} +; \
    fi \
    && python3 -c 'import sys; assert sys.version_info >= (3, 11), f"Safelight needs Python 3.11, BASE has {sys.version}"'
# The uid is fixed: volumes and Kubernetes' runAsUser name it.
RUN groupadd --gid 10001 safelight \
    && useradd --no-log-init --uid 10001 --gid 10001 --home-dir /var/lib/safelight --shell /usr/sbin/nologin safelight \
    && install -d -o 10001 -g 10001 -m 0750 /var/lib/safelight

# pip lives in a venv of its own, so that the one which is shipped holds neither pip nor setuptools.
FROM base AS build
ARG WHEELS=""
ARG OFFLINE=""
ARG TORCH_INDEX=""
RUN python3 -c 'import ensurepip' 2>/dev/null \
    || { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv; }
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/safelight
WORKDIR /src
COPY . .
RUN { echo "[global]"; echo "no-cache-dir = true"; echo "disable-pip-version-check = true"; \
      echo "constraint = /src/constraints.txt"; \
      [ -z "$WHEELS" ] || echo "find-links = /src/$WHEELS"; \
      [ "$OFFLINE" != 1 ] || echo "no-index = true"; \
      [ -z "$TORCH_INDEX" ] || echo "extra-index-url = $TORCH_INDEX"; } > /etc/pip.conf
ENV PIP="/opt/pip/bin/pip --python /opt/safelight/bin/python"

# What an image must not hold leaves here, before the copy, so that no layer keeps it.
# app.api and app.main need FastAPI; the other files of app are a few kilobytes and lean on the base install only.
FROM build AS build-api
RUN $PIP install --no-compile ".[api]" \
    && cd /opt/safelight/lib/python3*/site-packages && rm -rf worker models/emoji

FROM build AS build-sender
RUN $PIP install --no-compile . \
    && cd /opt/safelight/lib/python3*/site-packages && rm -rf app/api app/main.py worker models/emoji

# The worker alone keeps its bytecode: without it torch and diffusers take 12 s to import instead of 4.5, which every
# restart, and so every recovery from a crash, would pay.
FROM build AS build-worker
RUN $PIP install ".[worker]" \
    && cd /opt/safelight/lib/python3*/site-packages && rm -rf app/api app/main.py

FROM base AS runtime
# Reached from outside the container: the API then refuses to start without a key, and metrics are served to Prometheus.
ENV PATH=/opt/safelight/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SAFELIGHT_DATA=/var/lib/safelight \
    SAFELIGHT_HOST=0.0.0.0 \
    SAFELIGHT_LOG_FORMAT=json
WORKDIR /var/lib/safelight
STOPSIGNAL SIGTERM
USER 10001:10001

FROM runtime AS api
COPY --from=build-api /opt/safelight /opt/safelight
ENV SAFELIGHT_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s --retries=3 \
  CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['SAFELIGHT_PORT']}/livez\", timeout=2)"]
ENTRYPOINT ["/opt/safelight/bin/safelight", "api"]

FROM runtime AS sender
COPY --from=build-sender /opt/safelight /opt/safelight
ENV SAFELIGHT_METRICS_PORT=9400
EXPOSE 9400
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s --retries=3 \
  CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['SAFELIGHT_METRICS_PORT']}/metrics\", timeout=2)"]
ENTRYPOINT ["/opt/safelight/bin/safelight", "sender"]

FROM runtime AS worker
COPY --from=build-worker /opt/safelight /opt/safelight
# Models from a hub are kept in the state folder: the root file system may be read-only.
ENV SAFELIGHT_METRICS_PORT=9400 HF_HOME=/var/lib/safelight/hub
EXPOSE 9400
# Loading and warming a large model takes minutes.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
  CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['SAFELIGHT_METRICS_PORT']}/metrics\", timeout=2)"]
ENTRYPOINT ["/opt/safelight/bin/safelight", "worker"]
