"""The HTTP service: search, reranking, contexts, feedback and text; imported by scripts/serve.py alone.

Needs the extra `serve` (FastAPI, uvicorn, prometheus-client).
"""
