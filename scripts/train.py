"""Train a recipe: `python scripts/train.py --config configs/quantum_resonance.py [--preset quick] [--train.epochs 5]`.

The same command resumes an interrupted run. At the end the test split is evaluated: every first stage, then the
trained reranker alone and fused.
"""

from __future__ import annotations

from common.backends import load_encoder
from common.config import parse_command, to_dict
from common.errors import run_command
from common.prepare import prepare
from common.runs import RunFolder


def main() -> None:
    config, options = parse_command(__doc__ or "")
    encoder = load_encoder("default", options.backend)
    prepared = prepare(config, encoder)
    folder = RunFolder.create(
        options.runs,
        config.name,
        to_dict(config),
        resume=not options.fresh,
        data_fingerprint=prepared.data.fingerprint,
    )
    with folder:
        from jax_impl.training.loop import train_reranker

        print(train_reranker(config, prepared, folder))


if __name__ == "__main__":
    run_command(main)
