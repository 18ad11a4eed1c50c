"""A GGUF in llama.cpp beside its checkpoint in mlx-lm: token ids, probabilities, greedy continuation.

llama-server in a process of its own, by the Python package xllamacpp. No twin yet: JAX has no Qwen3.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, listed
from common.expansion.prompts import ExpansionPrompts, load_tokenizer
from common.export.llama_server import post

TEXTS = (
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n/no_think hi<|im_end|>\n",
    "<think>\n\n</think>\n\nlex: ssh keys\nvec: how to rotate ssh keys\n<|endoftext|>",
    "如何修理路由器，最后检查结果。東京の天気 한국어 문법",
    "Grüße, naïve café Ångström ﬁne",  # composed: llama.cpp does not apply Qwen3's NFC to decomposed letters
    "🙂 👩‍👩‍👧 🇨🇭 \u200d → ½",
    "def f(x):\n\treturn x**2  # 3.14e-10\n\n\n    if a != b: print(f'{a!r:>8}')",
    "  two  spaces\r\nand\ttabs   \n \n12345 0x1F C++ don't WE'LL",
)
QUERIES = ("rotate ssh keys", "如何修理路由器", "Tobi meeting notes /only:lex")
STEPS = 16  # tokens of a greedy continuation
LIKELIEST = 10  # tokens whose probabilities are compared at each of them
# the largest difference of a probability; other types are reported and not judged: they change the model
ALLOWED = {"F32": 0.02, "F16": 0.02, "BF16": 0.05, "Q8_0": 0.1}
PACKAGE = "xllamacpp"


@dataclass(frozen=True)
class RuntimeCheck:
    """What was compared: texts of equal token ids, equal tokens of the continued ones, and the largest
    difference of a probability.
    """

    texts: int
    equal: int
    continued: int
    difference: float

    def text(self) -> str:
        """In a line."""
        return (
            f"in llama.cpp: the same token ids for {self.texts} texts, {self.equal} of {self.continued} "
            f"greedy tokens those of mlx-lm, largest difference of a probability {self.difference:.2g}"
        )


def has_runtime() -> bool:
    """Whether a llama.cpp that runs models is installed here."""
    return importlib.util.find_spec(PACKAGE) is not None


def check_runtime(file: Path, directory: Path, kind: str) -> RuntimeCheck:
    """Run a GGUF of type `kind` in llama.cpp and hold it to the checkpoint that it was written from.

    UserError where token ids differ, or a probability by more than ALLOWED.
    """
    from mlx_impl.models.qwen import Origin, load_base

    tokenizer, model = load_tokenizer(directory), load_base(Origin(directory)).model
    prompts = ExpansionPrompts(tokenizer)
    asked = [prompts.prompt(query, consumer=bool(i % 2)) for i, query in enumerate(QUERIES)]
    texts = [*TEXTS, *(prompts.text(query) for query in QUERIES)]
    found = _ask(file, {"texts": texts, "prompts": asked})
    problems = [
        f"{text[:40]!r}: token ids {theirs[:12]}..., the tokenizer's are {ours[:12]}..."
        for text, theirs in zip(texts, found["tokens"], strict=True)
        if theirs != (ours := tokenizer.encode(text, add_special_tokens=False))
    ]
    equal = continued = 0
    difference = 0.0
    for prompt, steps in zip(asked, found["steps"], strict=True):
        same, apart = _compare(model, prompt, steps)
        equal, continued, difference = equal + same, continued + len(steps), max(difference, apart)
    if difference > ALLOWED.get(kind, 1.0):
        problems.append(f"a probability differs by {difference:.2g}; allowed for {kind}: {ALLOWED[kind]}")
    if problems:
        raise UserError(
            f"{file}: llama.cpp reads it otherwise than {directory}:\n{listed(problems)}\nDo not use it; "
            f"update {PACKAGE} or report this with the model's name."
        )
    return RuntimeCheck(len(texts), equal, continued, difference)


def _compare(model: Any, prompt: list[int], steps: list[dict[str, Any]]) -> tuple[int, float]:
    """Greedy tokens that are the source's, and the largest difference of a probability."""
    chosen = [step["id"] for step in steps]
    probabilities = _probabilities(model, [*prompt, *chosen])[len(prompt) - 1 : -1]  # [steps, V]
    equal, difference = 0, 0.0
    for step, ours in zip(steps, probabilities, strict=True):
        equal += int(ours.argmax()) == step["id"]
        for other in step["top_logprobs"]:
            difference = max(difference, abs(float(np.exp(other["logprob"])) - float(ours[other["id"]])))
    return equal, difference


def _probabilities(model: Any, ids: list[int]) -> np.ndarray:
    """mlx-lm's, [S, V]."""
    import mlx.core as mx

    logits = model(mx.array([ids]))[0].astype(mx.float32)
    return np.array(mx.softmax(logits, axis=-1))


def _ask(file: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Answers of llama-server, in a process whose output is kept apart."""
    program = "import sys; from mlx_impl.export.runtime import serve; serve(*sys.argv[1:])"
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "question.json"), Path(folder, "answer.json")
        question.write_text(json.dumps(wanted))
        done = subprocess.run(
            [sys.executable, "-c", program, str(file), str(question), str(answer)],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": path},
        )
        if done.returncode or not answer.exists():
            raise UserError(f"{file}: llama.cpp ({PACKAGE}) does not run it:\n{done.stderr.strip()[-800:]}")
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def serve(file: str, question: str, answer: str) -> None:
    """Answer a question of `check_runtime` by llama-server in this process."""
    import xllamacpp

    wanted = json.loads(Path(question).read_text())
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 1024, 1, False
    parameters.cpuparams.n_threads = min(4, os.cpu_count() or 1)
    parameters.n_gpu_layers = 0
    server = xllamacpp.Server(parameters)

    settings = {"n_predict": STEPS, "n_probs": LIKELIEST, "temperature": 0, "cache_prompt": False}
    tokens = [
        post(server, "/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        for text in wanted["texts"]
    ]
    steps = [
        post(server, "/completion", {"prompt": prompt, **settings})["completion_probabilities"]
        for prompt in wanted["prompts"]
    ]
    Path(answer).write_text(json.dumps({"tokens": tokens, "steps": steps}))
