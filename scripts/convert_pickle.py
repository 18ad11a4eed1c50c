"""Convert a checkpoint's pickled weights (pytorch_model*.bin) to model.safetensors, once.

The only place that reads a pickle, and only tensors (torch's weights_only); needs the extra `peers`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.checkpoint import MODEL_FILE, check_writable, write_file
from common.errors import UserError, run_command


def convert(directory: Path) -> Path:
    """Write `directory`/model.safetensors from its pickles; UserError when there is nothing to convert or
    it cannot be written."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder; give the checkpoint directory with the pickle in it.")
    target = directory / MODEL_FILE
    pickles = sorted(directory.glob("pytorch_model*.bin"))
    if target.exists():
        raise UserError(f"{target}: already there, nothing to convert.")
    if not pickles:
        raise UserError(
            f"{directory}: has no pytorch_model*.bin; give the checkpoint directory that holds one."
        )
    check_writable(target)
    try:
        import torch
        from safetensors.torch import save
    except ImportError:
        raise UserError("converting needs torch: pip install -e '.[peers]'") from None
    tensors: dict[str, torch.Tensor] = {}
    for pickle in pickles:
        try:
            loaded = torch.load(pickle, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types here, all about this one file
            raise UserError(
                f"{pickle}: cannot be read as tensors only ({type(error).__name__}). Copy or download the "
                "file again; one that holds anything else is not converted."
            ) from error
        if not isinstance(loaded, dict) or not all(isinstance(x, torch.Tensor) for x in loaded.values()):
            raise UserError(f"{pickle}: holds no table of tensors by name; this is no model's weights.")
        # Tied tensors share memory, which safetensors refuses: each gets its own copy.
        tensors |= {key: value.clone().contiguous() for key, value in loaded.items()}
    write_file(target, save(tensors, metadata={"format": "pt"}))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert pytorch_model*.bin to model.safetensors.",
        epilog="example: python scripts/convert_pickle.py ~/models/bert-base-uncased",
    )
    parser.add_argument("directory", type=Path, help="a checkpoint directory with pytorch_model*.bin")
    print(f"wrote {convert(parser.parse_args().directory.expanduser())}")


if __name__ == "__main__":
    run_command(main)
