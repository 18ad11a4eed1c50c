"""Continue prompts with a language model: greedy or sampled, one or many, as it is written, or in a dialogue.

example: python scripts/generate.py --model runs/infinito_small --prompt "The array is" --top-p 0.95

--interactive asks for prompts until an empty line or Ctrl-D; --demo shows the demonstration prompts; --file
holds one prompt a line. --instruction puts prompts into the form that instruction data is trained in. `<unk>`
is never written unless --allow-unknown. Texts of the same seed are the same.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import tyro

from common.checkpoint import read_config
from common.data.corpora import instruction_prompt
from common.errors import UserError, run_command
from common.hub import resolve_model
from common.language.architectures import InfinitoConfig, language_config
from common.language.config import MODEL_REMEDY
from common.language.generation import Generated, Piece, SamplingConfig
from common.language.samples import DEMO_PROMPTS, LanguageGenerator, load_generator


@dataclasses.dataclass(frozen=True)
class Args:
    model: str
    """A checkpoint directory, a run's folder, an ONNX export, or the name of a Llama or Qwen3 model."""
    prompt: tuple[str, ...] = ()
    """One or several."""
    file: Path | None = None
    """A text file with a prompt a line."""
    demo: bool = False
    interactive: bool = False
    instruction: bool = False
    """Prompts are instructions, to be put into Alpaca's form."""
    max_new_tokens: int = 128
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 0
    """0 for all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end a text."""
    allow_unknown: bool = False
    explore: bool = False
    """Noise on the memory's queries, as in training; Infinito only."""
    stream: bool = True
    """Shows the text as it is written, of a single prompt."""
    json: bool = False
    """One JSON object a line: prompt, text, tokens, finish, explored."""
    backend: Literal["auto", "jax", "mlx", "onnx"] = "auto"


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    args = tyro.cli(Args, args=words, description=__doc__)
    sampling = SamplingConfig.of_flags(args)
    prompts = given_prompts(args)
    check_explore(args)
    generator = load_generator(args.model, args.backend, say=lambda line: print(line, file=sys.stderr))
    if not args.allow_unknown:
        sampling = dataclasses.replace(sampling, banned=generator.tokenizer.unknown_ids)
    if args.interactive:
        for prompt in asked():
            try:
                written(args, generator, [prompt], sampling)
            except UserError as error:  # of this prompt; the next one may be good
                print(f"\nerror: {error}", file=sys.stderr)
    if prompts:
        written(args, generator, prompts, sampling)


def given_prompts(args: Args) -> list[str]:
    """All prompts but those of --interactive. UserError without any, and for an empty one."""
    prompts = [*args.prompt, *(DEMO_PROMPTS if args.demo else ())]
    if args.file is not None:
        try:
            prompts += [line for line in args.file.read_text(encoding="utf-8").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{args.file}: cannot be read ({error})") from None
    if not prompts and not args.interactive:
        raise UserError("there is no prompt: give --prompt TEXT, --file FILE, --demo or --interactive")
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty: give at least one word")
    return prompts


def check_explore(args: Args) -> None:
    """UserError for --explore of a model that would not do it."""
    if not args.explore:
        return
    directory = resolve_model(args.model, say=lambda _: None, remedy=MODEL_REMEDY)
    config = language_config(read_config(directory), directory)
    if not (isinstance(config, InfinitoConfig) and config.remembers and config.exploration):
        raise UserError(
            f"{directory}: --explore is noise on the queries of a memory, and this model has no memory or "
            "was trained without exploration: leave it out"
        )


def asked() -> Iterator[str]:
    """What is typed, until an empty line or the end."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def written(args: Args, generator: LanguageGenerator, prompts: list[str], sampling: SamplingConfig) -> None:
    """Continue prompts and print them, each behind its prompt."""
    shown = [instruction_prompt(prompt) for prompt in prompts] if args.instruction else prompts
    streams = args.stream and len(prompts) == 1 and not args.json
    if streams:
        print(prompts[0], end="\n" if args.instruction else "", flush=True)
    found = generator.generate(shown, sampling, tell if streams else None)
    if streams:
        print()
        return
    for prompt, made in zip(prompts, found, strict=True):
        print(json.dumps(as_json(prompt, made)) if args.json else f"--- {prompt}\n{made.text}")


def tell(piece: Piece) -> None:
    print(piece.text, end="", flush=True)


def as_json(prompt: str, made: Generated) -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": made.text,
        "tokens": len(made.ids),
        "finish": made.finish,
        "explored": made.explored,
    }


if __name__ == "__main__":
    run_command(main)
