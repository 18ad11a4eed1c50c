"""Prompts: the tokenizer's own template, no think block, where the completion begins, the consumer's form."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from common.data.expansion import ExpansionRow
from common.errors import UserError
from common.expansion.prompts import CONSUMER_SYSTEM, ExpansionPrompts, load_tokenizer
from tests.chat import TEMPLATE, chat_tokenizer

ROW = ExpansionRow("ssh keys", (("hyde", "Make a pair of keys."), ("lex", "ssh key")), intent="remote login")
QUESTION = "<|im_start|>user\n/no_think Expand this search query: ssh keys"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = f"<|im_start|>system\n{CONSUMER_SYSTEM}<|im_end|>\n"
WITHOUT_SYSTEM = "{%- if messages[0].role == 'system' %}{%- set messages = messages[1:] %}{%- endif %}"
TARGET = "hyde: Make a pair of keys.\nlex: ssh key\n<|im_end|>"


def shown(prompts: ExpansionPrompts, ids: Any) -> str:
    return prompts.tokenizer.decode(list(ids), skip_special_tokens=False)


def qwen(data_dir: Path, folder: Path) -> Any:
    files = data_dir / "tokenizers" / "qwen"
    if not (files / "qwen3.tokenizer.json.gz").is_file():
        pytest.skip(f"no Qwen3 tokenizer at {files}")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((files / "qwen3.tokenizer.json.gz").read_bytes()))
    (folder / "tokenizer_config.json").write_bytes((files / "qwen3.tokenizer_config.json").read_bytes())
    return load_tokenizer(folder)


def test_an_example_is_the_prompt_and_the_target_without_a_think_block() -> None:
    prompts = ExpansionPrompts(chat_tokenizer())
    example = prompts.example(ROW)
    assert (
        shown(prompts, example.ids[: example.start]) == f"{QUESTION}\nQuery intent: remote login{ASSISTANT}"
    )
    assert shown(prompts, example.ids[example.start :]) == TARGET
    assert example.ids[-1] == prompts.end_id == prompts.tokenizer.eos_token_id
    assert "think>" not in shown(prompts, example.ids)
    assert list(example.ids[: example.start]) == prompts.prompt("ssh keys", "remote login")


def test_the_mask_is_the_completion() -> None:
    example = ExpansionPrompts(chat_tokenizer()).example(ROW)
    assert len(example.mask) == len(example.ids)
    assert example.mask.index(True) == example.start and all(example.mask[example.start :])


@pytest.mark.parametrize(
    "system, forms", [("none", (0, 0, 0)), ("consumer", (1, 1, 1)), ("mixed", (0, 1, 0))]
)
def test_the_system_prompt_of_the_consumer_is_there_as_asked(system: Any, forms: tuple[int, ...]) -> None:
    prompts = ExpansionPrompts(chat_tokenizer(), system=system)
    for turn, with_system in enumerate(forms):
        text = shown(prompts, prompts.example(ROW, turn).ids)
        assert text.startswith(SYSTEM + QUESTION if with_system else QUESTION)


def test_the_originals_form_has_no_final_newline_and_lfm2_no_switch() -> None:
    prompts = ExpansionPrompts(chat_tokenizer(), system="none", final_newline=False, no_think=False)
    text = shown(prompts, prompts.example(ExpansionRow("q", ROW.lines)).ids)
    assert text == f"<|im_start|>user\nExpand this search query: q{ASSISTANT}{TARGET}".replace(
        "key\n<|im_end|>", "key<|im_end|>"
    )


def test_what_is_generated_is_read_up_to_the_end_of_turn() -> None:
    prompts = ExpansionPrompts(chat_tokenizer())
    ids = prompts.completion(ROW.lines)
    assert prompts.decode([*ids, *ids]) == TARGET.removesuffix("<|im_end|>")
    assert prompts.decode(ids[:5]) == "hyde:"
    other = prompts.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert prompts.decode([other]) == "<|endoftext|>"


def test_control_tokens_in_a_query_or_a_line_are_refused() -> None:
    prompts = ExpansionPrompts(chat_tokenizer())
    with pytest.raises(UserError, match=r"the query has the control token '<\|im_end\|>'"):
        prompts.prompt("a <|im_end|> b")
    with pytest.raises(UserError, match="a line has the control token '<think>'"):
        prompts.completion([("lex", "a <think>")])
    with pytest.raises(UserError, match="the query is empty"):
        prompts.prompt("  ")


@pytest.mark.parametrize(
    "template, special, what",
    [
        (None, (), "has no chat template"),
        (TEMPLATE.replace("m.content", "m.content | upper"), (), "does not continue its own prompt"),
        (TEMPLATE.replace("assistant\n", "model\n"), (), "does not continue its own prompt"),
        (TEMPLATE.replace("<|im_end|>", "<end>"), (), r"the end of turn '<end>' is 5 tokens"),
        (WITHOUT_SYSTEM + TEMPLATE, (), "drops the system prompt"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: Any, special: Any, what: str) -> None:
    with pytest.raises(UserError, match=what):
        ExpansionPrompts(chat_tokenizer(template, special))


def test_an_unknown_system_and_a_folder_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the system prompt is 'qmd'; allowed: none, consumer, mixed"):
        ExpansionPrompts(chat_tokenizer(), system="qmd")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"tokenizer_config\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_qwen3_gives_its_own_prompt_and_the_same_tokens_as_the_whole_text(
    data_dir: Path, tmp_path: Path
) -> None:
    tokenizer = qwen(data_dir, tmp_path)
    prompts = ExpansionPrompts(tokenizer)
    rows = [
        ROW,
        ExpansionRow("如何 café", (("hyde", " 你好"), ("vec", "1234 x"))),
        ExpansionRow("C++", ROW.lines),
    ]
    for turn, row in enumerate(rows):
        example = prompts.example(row, turn)
        assert tuple(tokenizer.encode(shown(prompts, example.ids))) == example.ids
    example = prompts.example(ROW, 1)
    text = f"{SYSTEM}{QUESTION}\nQuery intent: remote login{ASSISTANT}{TARGET}"
    assert shown(prompts, example.ids) == text
    assert prompts.end == "<|im_end|>" and prompts.end_id == 151645
