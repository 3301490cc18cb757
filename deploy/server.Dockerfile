# The server of a federation: coordinates, and never sees a record. Build it from the root of the clone:
#   docker build --file deploy/server.Dockerfile --tag bract-server .
# A server needs no GPU, so torch comes from PyTorch's index of builds for processors.
FROM python:3.12-slim AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/bract \
 && /opt/bract/bin/pip install --no-cache-dir --constraint constraints.txt \
      --extra-index-url https://download.pytorch.org/whl/cpu .

FROM python:3.12-slim
RUN groupadd --gid 10001 bract && useradd --uid 10001 --gid bract --no-create-home --shell /usr/sbin/nologin bract \
 && install --directory --owner=bract --group=bract --mode=0700 /runs
COPY --from=build /opt/bract /opt/bract
ENV PATH=/opt/bract/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER bract
WORKDIR /runs
EXPOSE 9092 9100
# It is healthy once /metrics answers; the port is not to be published.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9100/metrics', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["bract", "server", "/experiment/experiment.toml", "--listen", "0.0.0.0:9092", "--identity", "/identity", \
            "--metrics", "127.0.0.1:9100", "--log-format", "json"]
CMD ["--out", "/runs/run"]
