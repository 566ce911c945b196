# The server, for amd64 and arm64:
#
#   docker build -f docker/server.Dockerfile -t fedknow-server --build-arg TORCH_INDEX=URL .
#   docker buildx build --platform linux/amd64,linux/arm64 ...
#
# TORCH_INDEX is where pip finds PyTorch's CPU build; without it, an amd64 image gets the CUDA build, some GB more.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=
WORKDIR /build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fedknow
COPY constraints.txt ./
RUN /opt/fedknow/bin/pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY fedknow fedknow
COPY protocols protocols
COPY client client
COPY strategies strategies
COPY server server
COPY simulations simulations
RUN /opt/fedknow/bin/pip install -c constraints.txt '.[server,data]'

FROM python:${PYTHON}-slim
RUN useradd --uid 10001 --create-home fedknow \
    && install -d -o fedknow -g fedknow -m 700 /certs /runs
COPY --from=build /opt/fedknow /opt/fedknow
ENV PATH=/opt/fedknow/bin:$PATH PYTHONUNBUFFERED=1 FLWR_TELEMETRY_ENABLED=0 MPLCONFIGDIR=/tmp FEDKNOW_DATA=/data
USER 10001:10001
WORKDIR /home/fedknow
VOLUME ["/certs", "/runs"]
EXPOSE 8700
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=60s --timeout=30s --start-period=60s --retries=3 \
    CMD ["fedknow", "status", "--server", "localhost:8700", "--tls", "/certs"]
ENTRYPOINT ["fedknow"]
CMD ["server", "digits", "--listen", "0.0.0.0:8700", "--tls", "/certs", "--out", "/runs/digits", "--resume"]
