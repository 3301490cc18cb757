# A site of a federation: trains on its owner's data, and connects outwards only. Build it from the root of the clone:
#   docker build --file deploy/client.Dockerfile --tag bract-client .
# With a GPU leave TORCH_INDEX empty, so that torch comes with CUDA, and start the container with --gpus:
#   docker build --file deploy/client.Dockerfile --build-arg TORCH_INDEX= --tag bract-client:cuda .
FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY . .
RUN python -m venv /opt/bract \
 && /opt/bract/bin/pip install --no-cache-dir --constraint constraints.txt \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} .

FROM python:3.12-slim
RUN groupadd --gid 10001 bract && useradd --uid 10001 --gid bract --no-create-home --shell /usr/sbin/nologin bract \
 && install --directory --owner=bract --group=bract --mode=0700 /state
COPY --from=build /opt/bract /opt/bract
ENV PATH=/opt/bract/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER bract
WORKDIR /state
STOPSIGNAL SIGTERM
ENTRYPOINT ["bract", "client", "--identity", "/identity", "--policy", "/policy/policy.toml", "--state", "/state", \
            "--log-format", "json"]
CMD ["--server", "server:9092", "--keep"]
