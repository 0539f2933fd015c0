# The service without a model: mount a checkpoint, or let it be fetched by hub id into a volume at /home/reward/.cache.
#
#   docker build -t reward-service .                                              GPU: torch's wheel brings CUDA's libraries
#   docker build -t reward-service:cpu --build-arg DEVICE=cpu --build-arg TORCH_INDEX=URL .
#                                                            CPU: URL is the package index of torch's CPU builds
#   docker run --rm --gpus all --shm-size 1g -p 8000:8000 -v /path/to/checkpoint:/model:ro \
#     -v /path/to/keys.yaml:/keys.yaml:ro reward-service --model /model --api-keys /keys.yaml
#
# Without API keys (reward-key) it starts only with --authentication none, since it listens on all interfaces.
#
# Publish port 8000 alone. docs/deployment.md explains the build, the sizes of the layers and the other ports.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# Alone, so that the large layer is built again only when a dependency changes, and not with every pyproject.toml.
FROM ${BASE_IMAGE} AS torch-version
WORKDIR /src
COPY pyproject.toml ./
RUN python -c 'import tomllib; print(*(line for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["serve"] if line.startswith("torch==")))' > torch.txt

FROM ${BASE_IMAGE} AS dependencies
ARG DEVICE=gpu
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH="/opt/venv/bin:${PATH}"
WORKDIR /src
COPY requirements requirements
# A CPU image takes ONNX Runtime's CPU build, whose hashes are in the lock for machines without x86-64.
RUN if [ "${DEVICE}" = cpu ]; then \
      sed -i -e '/^onnxruntime-gpu==/,/[^\\]$/d' -e 's/^\(onnxruntime==[^ ]*\) ;.*$/\1 \\/' requirements/serve.txt; \
    fi \
    && pip install --no-deps --require-hashes --requirement requirements/serve.txt
# The lock leaves torch out, since its build depends on the device. What torch shares with it is there already, by hash,
# so that the index of torch's CPU builds gives nothing but torch and the little that it alone requires. The wrong build
# is refused here, since later it would only be noticed as a slow service or a failed start.
COPY --from=torch-version /src/torch.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} --constraint requirements/constraints.txt --requirement torch.txt \
    && python -c 'import sys, torch; sys.exit(None if (torch.version.cuda is None) == (sys.argv[1] == "cpu") else f"DEVICE is {sys.argv[1]}, but torch {torch.__version__} is not built for it: see TORCH_INDEX")' "${DEVICE}"

FROM dependencies AS service
# Compiles the CPU kernels; any version works.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md ./
COPY client client
COPY service service
COPY export export
COPY training training
COPY scoring scoring
COPY loadtest loadtest
COPY monitoring monitoring
# Into a folder of its own, so that an image with other code shares the large layer of the dependencies.
RUN PIP_CONSTRAINT=requirements/constraints.txt pip install --no-deps --target /opt/service .
# Outside /src, so that the installed package is imported and gets the kernels.
WORKDIR /opt
RUN PYTHONPATH=/opt/service python -m service.engines.kernels

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="reward-service" \
      org.opencontainers.image.licenses="Apache-2.0"
# The folder of the cache belongs to the user, so a new volume that is mounted there does too.
RUN useradd --uid 10001 --user-group --create-home reward \
    && install --directory --owner=reward --group=reward /home/reward/.cache
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=service /opt/service /opt/service
ENV PATH="/opt/service/bin:/opt/venv/bin:${PATH}" \
    PYTHONPATH=/opt/service \
    PYTHONUNBUFFERED=1 \
    REWARD_LOG=-
USER 10001:10001
WORKDIR /home/reward
VOLUME /home/reward/.cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# Loading a large model takes minutes; failures within the start period do not count.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
  CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/readyz', timeout=4)"]
# No init is needed: as process 1 reward-serve handles the signals and reaps the processes that Ray leaves behind.
ENTRYPOINT ["reward-serve", "--host", "0.0.0.0"]
