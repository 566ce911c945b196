# The client of an edge box, for amd64 and arm64 (Raspberry Pi, Jetson without its GPU):
#
#   docker build -f docker/client.Dockerfile -t fedknow-client --build-arg TORCH_INDEX=URL .
#   docker buildx build --platform linux/amd64,linux/arm64 ...
#
# TORCH_INDEX is where pip finds PyTorch's CPU build; without it, an amd64 image gets the CUDA build, some GB more.
# EXTRAS=data brings what reads the public data sets; a client with data of its own (data.name = local) needs none.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=
ARG EXTRAS=
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
RUN /opt/fedknow/bin/pip install -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"

FROM python:${PYTHON}-slim
RUN useradd --uid 10001 --create-home fedknow \
    && install -d -o fedknow -g fedknow -m 700 /certs /state
COPY --from=build /opt/fedknow /opt/fedknow
ENV PATH=/opt/fedknow/bin:$PATH PYTHONUNBUFFERED=1 SERVER=server:8700 FEDKNOW_DATA=/data
USER 10001:10001
WORKDIR /home/fedknow
VOLUME ["/certs", "/state"]
STOPSIGNAL SIGTERM
# Healthy: this client's certificate opens the server's door. SERVER says where that is.
HEALTHCHECK --interval=60s --timeout=30s --start-period=60s --retries=3 \
    CMD ["sh", "-c", "fedknow status --server \"$SERVER\" --tls /certs"]
ENTRYPOINT ["fedknow"]
CMD ["client", "--server", "server:8700", "--tls", "/certs", "--state", "/state"]
