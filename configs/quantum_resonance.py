"""Fine-tune a quantum-resonance reranker from a pretrained sentence encoder."""

from common.config import RerankerConfig


def get_config(preset=None):
    return RerankerConfig()


PRESETS = {"quick": 1}
