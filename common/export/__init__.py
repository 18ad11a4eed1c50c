"""Exported models: GGUF written, ONNX scored, llama.cpp's server, and each verified against its source."""
