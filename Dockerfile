# The service without a model: mount a checkpoint, or let it be fetched by hub id into a volume at /home/reward/.cache.
#
#   docker build -t reward-service .                                    GPU: the torch wheel brings its CUDA libraries
#   docker build -t reward-service --build-arg TORCH_INDEX=<url> .      CPU: <url> is the package index of torch's CPU builds
#   docker run --rm --gpus all --shm-size 1g -p 8000:8000 -v /path/to/checkpoint:/model:ro \
#     -v /path/to/keys.yaml:/keys.yaml:ro reward-service --model /model --api-keys /keys.yaml
#
# Without API keys (reward-key) it starts only with --authentication none, since it listens on all interfaces.
#
# Publish port 8000 alone; docs/operations.md lists the other ports. Settings can be given as -e REWARD_...=...
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# Compiles the CPU kernels; any version works.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH="/opt/venv/bin:${PATH}"
WORKDIR /src
COPY pyproject.toml ./
# Torch first and alone, so that no other package is taken from the index of its CPU builds.
RUN if [ -n "${TORCH_INDEX}" ]; then \
      python -c 'import tomllib; print(*(line for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["serve"] if line.startswith("torch==")))' > torch.txt \
      && pip install --index-url "${TORCH_INDEX}" --requirement torch.txt; \
    fi
COPY README.md ./
COPY client client
COPY service service
COPY export export
COPY training training
COPY scoring scoring
COPY loadtest loadtest
# A local folder; its dependencies are pinned in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install '.[serve]'
# Outside /src, so that the installed package is imported and gets the kernels.
WORKDIR /opt
RUN python -m service.engines.kernels

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="reward-service" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --create-home reward
COPY --from=build /opt/venv /opt/venv
ENV PATH="/opt/venv/bin:${PATH}" \
    PYTHONUNBUFFERED=1 \
    REWARD_LOG=-
USER 10001
WORKDIR /home/reward
EXPOSE 8000
STOPSIGNAL SIGTERM
# Loading a large model takes minutes; failures within the start period do not count.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
  CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["reward-serve", "--host", "0.0.0.0"]
