"""What an expansion model reads and is to write: QMD's user message in the tokenizer's own chat template.

QMD asks through node-llama-cpp, which puts a system prompt in front; its grammar ends each line by a newline.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.data.expansion import INTENT, MARKER, ExpansionRow, Line, render_lines
from common.errors import UserError

# node-llama-cpp's defaultChatSystemPrompt (3.3 to 3.20): what a model in QMD has before its question
CONSUMER_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible.\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something incorrectly. If you don't know the answer to a question, don't share false information."
)
NO_THINK = "/no_think "
System = Literal["none", "consumer", "mixed"]
_SYSTEMS = ("none", "consumer", "mixed")
_ANSWER = "lex: an answer"  # stands in the template where the target will


@dataclass(frozen=True)
class Prompted:
    """Token ids of a prompt and its completion; the completion begins at `start`."""

    ids: tuple[int, ...]
    start: int

    @property
    def mask(self) -> tuple[bool, ...]:
        """Of each token, whether it belongs to the completion: where the loss is taken."""
        return tuple(place >= self.start for place in range(len(self.ids)))


class ExpansionPrompts:
    """Renders prompts and training examples as token ids, through `apply_chat_template` of a tokenizer.

    `system` is what training examples have before the question: nothing ("none": the original and
    llama-server), node-llama-cpp's default system prompt ("consumer": QMD), or each in turn ("mixed").
    `final_newline` ends the last line as QMD's grammar demands; `no_think` begins the question with Qwen3's
    switch. No example holds a think block. Raises UserError for a tokenizer without a usable template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        system: System = "mixed",
        final_newline: bool = True,
        no_think: bool = True,
    ) -> None:
        if system not in _SYSTEMS:
            raise UserError(f"the system prompt is {system!r}; allowed: {', '.join(_SYSTEMS)}.")
        self.tokenizer, self.system = tokenizer, system
        self.final_newline, self.no_think = final_newline, no_think
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer {_name(tokenizer)} has no chat template. Take that of an instruction "
                "model (tokenizer_config.json with 'chat_template', or chat_template.jinja), such as "
                "Qwen/Qwen3-1.7B: node-llama-cpp chooses QMD's prompt by the template."
            )
        self._special = _special_texts(tokenizer)
        self.end = self._end_of_turn()  # the text that ends an answer
        self.end_id = self._one_id(self.end)

    def text(self, query: str, intent: str = "", *, consumer: bool = False) -> str:
        """The prompt as text, up to where the answer begins; `consumer` with QMD's system prompt."""
        return self._render(self._messages(query, intent, consumer), generate=True)

    def prompt(self, query: str, intent: str = "", *, consumer: bool = False) -> list[int]:
        """The prompt's token ids. Raises UserError for a query with one of the tokenizer's control tokens."""
        return self._ids(self.text(query, intent, consumer=consumer))

    def completion(self, lines: Iterable[Line]) -> list[int]:
        """The target's token ids: the lines, QMD's final newline, the end of the turn."""
        text = render_lines(lines)
        self._check(text, "a line")
        return [*self._ids(text + ("\n" if self.final_newline else "")), self.end_id]

    def example(self, row: ExpansionRow, turn: int = 0) -> Prompted:
        """A training example. With "mixed" an even `turn` has no system prompt and an odd one has QMD's: pass
        the row's place plus the epoch, and every row is seen in both forms."""
        consumer = self.system == "consumer" or (self.system == "mixed" and turn % 2 == 1)
        prompt = self.prompt(row.query, row.intent, consumer=consumer)
        return Prompted((*prompt, *self.completion(row.lines)), len(prompt))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the end of the turn; other control tokens stay visible."""
        kept = list(ids)
        if self.end_id in kept:
            kept = kept[: kept.index(self.end_id)]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=False)
        return text

    def _messages(self, query: str, intent: str, consumer: bool) -> list[dict[str, str]]:
        query, intent = query.strip(), intent.strip()
        if not query:
            raise UserError("the query is empty; give a text to expand.")
        question = f"{NO_THINK if self.no_think else ''}{MARKER} {query}"
        question += f"\n{INTENT} {intent}" if intent else ""
        self._check(question, "the query")
        messages = [{"role": "user", "content": question}]
        return [{"role": "system", "content": CONSUMER_SYSTEM}, *messages] if consumer else messages

    def _check(self, text: str, what: str) -> None:
        found = self._special.search(text)
        if found:
            raise UserError(f"{what} has the control token {found[0]!r}: {text[:80]!r}. Remove it.")

    def _render(self, messages: list[dict[str, str]], *, generate: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )
        return text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _end_of_turn(self) -> str:
        """What the template writes behind an answer, but for white space; UserError if there is none."""
        messages = self._messages("a question", "", True)
        prompt = self._render(messages, generate=True)
        answer = {"role": "assistant", "content": _ANSWER}
        whole = self._render([*messages, answer], generate=False)
        rest = re.sub(r"^\s*<think>\s*</think>\s*", "", whole.removeprefix(prompt))
        end = rest.removeprefix(_ANSWER).strip()
        if not (whole.startswith(prompt) and rest.startswith(_ANSWER) and end):
            raise UserError(
                f"the chat template of {_name(self.tokenizer)} does not continue its own prompt by an "
                f"answer and an end of turn: {whole[len(prompt) - 40 :]!r}. Use the tokenizer's own."
            )
        if CONSUMER_SYSTEM not in prompt:
            raise UserError(
                f"the chat template of {_name(self.tokenizer)} drops the system prompt, which QMD sends. Use "
                "the tokenizer's template unchanged."
            )
        return end

    def _one_id(self, text: str) -> int:
        ids = self._ids(text)
        if len(ids) != 1:
            raise UserError(
                f"the end of turn {text!r} is {len(ids)} tokens of {_name(self.tokenizer)}, and must be one: "
                "the template belongs to another tokenizer. Take both from one model."
            )
        return ids[0]


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a checkpoint directory, with its chat template. Raises UserError if there is none."""
    expected = "Expected tokenizer.json and tokenizer_config.json of the base model."
    if not (Path(directory) / "tokenizer_config.json").is_file():
        raise UserError(f"{directory}: no tokenizer, tokenizer_config.json is missing. {expected}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # broken files raise whatever the parts of transformers and tokenizers raise
        reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
        raise UserError(f"{directory}: the tokenizer cannot be loaded ({reason}). {expected}") from error


def _special_texts(tokenizer: Any) -> re.Pattern[str]:
    """Finds the tokenizer's control tokens in a text: they would be read as control, not as text."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values()}
    texts |= {token for token in tokenizer.all_special_tokens if token}
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))) or r"(?!)")


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
