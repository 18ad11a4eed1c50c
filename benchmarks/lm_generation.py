"""Speed of greedy generation, beside transformers' `generate` on a Llama of the same shape and weights.

The peer makes the model at random and writes it; ours loads it strictly. Both continue the same prompts by
the same number of tokens with a KV cache, in processes of their own that take turns; the share of equal
tokens stands in the row. Compilation and warm-up are left out. CPU seconds stand beside the rates.
Measure on an idle machine: PyTorch's threads spin while they wait for a busy core.
    python benchmarks/lm_generation.py              # batch 1 and 8
    python benchmarks/lm_generation.py --quick      # does it run?
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lm_training import Took
from benchmarks.peer import Peer, answer_all
from benchmarks.record import RESULTS, Record, Row, compared
from common.errors import UserError, run_command
from common.language.generation import SamplingConfig, generate

PEER = "transformers generate"


def main(argv: Sequence[str] | None = None) -> None:
    options = parsed(argv)
    names = ("vocab_size", "hidden_size", "layers", "heads", "prompt_tokens", "new_tokens", "repetitions")
    workload = {name: getattr(options, name) for name in names}
    record = Record("lm_generation", workload, folder=Path(options.results))
    for row in measured(options):
        record.add(row, replace=True)
        print(
            f"{row['what']}: {row['ours']:,.0f} against {row['peer']:,.0f} {row['unit']}, ratio "
            f"{row['ratio']:.2f}; by CPU time {row['cpu_ratio']:.2f}; {row['equal_tokens']:.1%} equal",
            flush=True,
        )


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts at once")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--results", default=str(RESULTS), help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one repetition")
    options = parser.parse_args(argv)
    if options.quick:
        options.vocab_size, options.hidden_size, options.layers, options.heads = 64, 32, 2, 2
        options.prompt_tokens, options.new_tokens, options.repetitions = 4, 6, 1
    if min(options.prompt_tokens, options.new_tokens, options.repetitions, *options.batch) < 1:
        raise UserError("--batch, --prompt-tokens, --new-tokens, --repetitions: at least 1")
    return options


def llama(options: argparse.Namespace) -> dict[str, Any]:
    """The model's settings, under transformers' names."""
    return {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": 8 * options.hidden_size // 3 // 8 * 8,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "max_position_embeddings": options.prompt_tokens + options.new_tokens,
        "tie_word_embeddings": True,
    }


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each batch size, as it is measured."""
    with tempfile.TemporaryDirectory() as folder, Peer(serve_peer, folder, llama(options)) as peer:
        peer.run("write", None)
        for rows in options.batch:
            yield measure(Path(folder), peer, rows, options)


class Endless:
    """A tokenizer without an end: what is generated stays ids."""

    end = None

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def measure(directory: Path, peer: Peer, rows: int, options: argparse.Namespace) -> Row:
    """A row: each repetition has prompts of its own, which both continue, in turn; the first warms up."""
    from jax_impl.generation import load_engine

    engine, rng = load_engine(directory), np.random.default_rng(0)
    sampling = SamplingConfig(max_new_tokens=options.new_tokens, temperature=0)
    mine: list[Took] = []
    theirs: list[Took] = []
    equal: list[float] = []
    for _ in range(options.repetitions + 1):
        prompts = rng.integers(0, options.vocab_size, (rows, options.prompt_tokens)).tolist()
        wall, cpu = time.perf_counter(), time.process_time()
        made = [item.ids for item in generate(engine, prompts, Endless(), sampling)]
        mine.append((time.perf_counter() - wall, time.process_time() - cpu))
        took, written = peer.run("generate", (prompts, options.new_tokens))
        theirs.append(took)
        equal.append(float(np.mean(np.array(made) == np.array(written))))
    count = rows * options.new_tokens

    def rates(took: list[Took], which: int) -> list[float]:
        return [count / t[which] for t in took[1:]]

    ratio = float(np.median(rates(mine, 1)) / np.median(rates(theirs, 1)))
    shares = {"equal_tokens": float(np.mean(equal)), "cpu_ratio": ratio}
    what = f"greedy generation, batch {rows}"
    return compared(what, rates(mine, 0), rates(theirs, 0), PEER, "new tokens/s", **shares)


def serve_peer(connection: Connection, directory: str, settings: dict[str, Any]) -> None:
    """The peer's process: takes (kind, what) and answers; `write` makes the model, `generate` continues."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # No end and no padding: every text has the same length.
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = LlamaForCausalLM(LlamaConfig(**settings, **ids, initializer_range=0.2)).eval()

    def answer(kind: str, what: Any) -> Any:
        if kind == "write":
            model.save_pretrained(directory)
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            return None
        prompts, count = what
        wall, cpu = time.perf_counter(), time.process_time()
        given = torch.tensor(prompts, device=model.device)
        same = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
        with torch.inference_mode():
            made = model.generate(given, attention_mask=torch.ones_like(given), **same)
        written = made[:, given.shape[1] :].tolist()
        return (time.perf_counter() - wall, time.process_time() - cpu), written

    answer_all(connection, answer)


if __name__ == "__main__":
    run_command(main)
