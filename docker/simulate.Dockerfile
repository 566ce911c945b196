# Simulations on Ray, for amd64 and arm64: a machine of a cluster, or a whole run in one container:
#
#   docker build -f docker/simulate.Dockerfile -t fedknow-simulate --build-arg TORCH_INDEX=URL .
#   docker buildx build --platform linux/amd64,linux/arm64 ...
#   docker run --shm-size=2g -v "$PWD/runs:/runs" fedknow-simulate simulate digits --out /runs/digits
#
# TORCH_INDEX is where pip finds PyTorch's CPU build; without it, an amd64 image gets the CUDA build, some GB more.
# EXTRAS names further packages, separated by spaces. Modules of yours go on top:
#
#   FROM fedknow-simulate
#   COPY --chown=fedknow my_module.py /code/
#
# Python finds what lies in /code. Data sets that were read once are kept in /cache (FEDKNOW_CACHE).
# Ray keeps arrays in shared memory, so give the container more than Docker's 64 MB.
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
# ray[default] has what a cluster's head needs: the dashboard, and with it jobs.
RUN /opt/fedknow/bin/pip install -c constraints.txt '.[sim]' 'ray[default]' ${EXTRAS}

FROM python:${PYTHON}-slim
RUN useradd --uid 10001 --create-home fedknow \
    && install -d -o fedknow -g fedknow /runs /code /cache
COPY --from=build /opt/fedknow /opt/fedknow
ENV PATH=/opt/fedknow/bin:$PATH PYTHONPATH=/code PYTHONUNBUFFERED=1 FLWR_TELEMETRY_ENABLED=0 \
    RAY_USAGE_STATS_ENABLED=0 MPLCONFIGDIR=/tmp FEDKNOW_DATA=/data FEDKNOW_CACHE=/cache
USER 10001:10001
WORKDIR /home/fedknow
VOLUME ["/runs", "/cache"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fedknow"]
CMD ["simulate", "digits", "--out", "/runs/digits"]
