"""Tokenizers of language models: trained on a corpus, of a checkpoint, or of a name; ids and what counts.

Source: Sennrich et al. 2016, arXiv:1508.07909 (BPE); its byte-level form, Radford et al. 2019 (GPT-2).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.cache import cache_key, read_cache, write_cache
from common.checkpoint import read_json, surviving, to_json
from common.data.corpora import UNKNOWN, Document
from common.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# what a checkpoint directory may hold of its tokenizer
TOKENIZER_FILES = (
    *(TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, "chat_template.jinja", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "generation_config.json"),
)
# what ends a text, in the order of preference
_ENDS = (END_OF_TEXT, "<|im_end|>", "</s>")
# name -> its folder in $RESONANCE_DATA/tokenizers, its repository on the hub
NAMED = {
    "gpt2": ("gpt2", "openai-community/gpt2"),
    "llama2": ("llama2-32k", "TinyLlama/TinyLlama_v1.1"),
}


class LanguageTokenizer:
    """Text to ids and back. `end` is the id that ends a text and begins the next one."""

    def __init__(self, tokenizer: Tokenizer, *, name: str, end: str | None = None) -> None:
        """`end` is the token that ends a text; absent, the first of the usual ones. UserError without one."""
        self._tokenizer, self.name = tokenizer, name
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.end_token = end or next((word for word in _ENDS if tokenizer.token_to_id(word) is not None), "")
        found = tokenizer.token_to_id(self.end_token)
        if found is None:
            raise UserError(f"tokenizer {name}: has none of the tokens that end a text: {', '.join(_ENDS)}")
        self.end: int = found
        unknown = tokenizer.encode(f" {UNKNOWN}", add_special_tokens=False)
        # of several tokens the ones that spell the word, not the brackets
        spelled = [i for i, token in zip(unknown.ids, unknown.tokens, strict=True) if "unk" in token]
        self.unknown_ids: tuple[int, ...] = tuple(spelled)

    @property
    def vocab_size(self) -> int:
        """Ids are below this, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 [n], nothing added."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_documents(
        self, documents: Sequence[Document], *, mask_unknown: bool, mask_prompt: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each document its ids int32 [n] and what the loss counts, bool [n].

        `mask_unknown` leaves out the tokens of `<unk>`, `mask_prompt` those that begin within the prompt.
        """
        for start in range(0, len(documents), 256):  # bounds the memory of the encodings
            part = documents[start : start + 256]
            encodings = self._tokenizer.encode_batch_fast if not (mask_unknown or mask_prompt) else None
            found = (encodings or self._tokenizer.encode_batch)(
                [document.text for document in part], add_special_tokens=False
            )
            for document, encoding in zip(part, found, strict=True):
                counted = np.ones(len(encoding.ids), bool)
                if mask_unknown or mask_prompt:
                    counted = _counted(document, encoding.offsets, mask_unknown, mask_prompt)
                yield np.asarray(encoding.ids, np.int32), counted

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ids; `special` keeps the tokens that end texts and the like."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special)
        return text

    def vocabulary(self) -> dict[str, int]:
        """Each token's spelling and its id."""
        found: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return found

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which transformers loads the same."""
        self._tokenizer.save(str(directory / TOKENIZER_FILE))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end_token,
            "bos_token": self.end_token,
            "pad_token": self.end_token,
            "clean_up_tokenization_spaces": False,
        }
        (directory / TOKENIZER_CONFIG_FILE).write_bytes(to_json(settings))

    def fingerprint(self) -> str:
        """16 hex digits that change with any id."""
        return cache_key(self._tokenizer.to_str(), self.end_token)


def _counted(
    document: Document, offsets: Sequence[tuple[int, int]], mask_unknown: bool, mask_prompt: bool
) -> np.ndarray:
    borders = np.asarray(offsets, np.int64).reshape(-1, 2)
    counted = np.ones(len(borders), bool)
    if mask_prompt:
        counted &= borders[:, 0] >= document.prompt
    place = document.text.find(UNKNOWN) if mask_unknown else -1
    while place >= 0:
        end = place + len(UNKNOWN)
        counted &= (borders[:, 1] <= place) | (borders[:, 0] >= end)
        place = document.text.find(UNKNOWN, end)
    return counted


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens: it encodes every text, and `<unk>` is one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.replace(UNKNOWN, "") for text in texts), trainer)
    tokenizer.add_tokens([AddedToken(UNKNOWN, normalized=False)])  # a word like others: decoding keeps it
    return tokenizer


def corpus_tokenizer(documents: Sequence[Document], vocab_size: int, cache: Path) -> LanguageTokenizer:
    """The BPE trained on documents, kept in `cache`. UserError for a vocabulary that bytes do not fit in."""
    from tokenizers import Tokenizer

    if vocab_size < 512:
        raise UserError(f"data.vocab_size is {vocab_size}; allowed: >= 512, 256 of which are bytes")
    texts = [document.text for document in documents]
    file = cache / f"bpe-{cache_key(vocab_size, texts)}.json"
    if not file.exists():
        write_cache(file, train_bpe(texts, vocab_size).to_str().encode())
    tokenizer = read_cache(file, lambda path: Tokenizer.from_str(json.dumps(json.loads(path.read_text()))))
    return LanguageTokenizer(tokenizer, name=f"bpe-{vocab_size}")


def load_tokenizer(name: str | Path, *, say: Callable[[str], None] = lambda _: None) -> LanguageTokenizer:
    """A tokenizer by path (tokenizer.json, or a folder or run that holds one) or name (gpt2, llama2, the
    hub's owner/name). Raises UserError."""
    from tokenizers import Tokenizer

    file = _tokenizer_file(str(name))
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a plain Exception
        raise UserError(f"{file}: cannot be read as a tokenizer ({error}). Copy the file again.") from error
    settings = file.with_name(TOKENIZER_CONFIG_FILE)
    end = read_json(settings).get("eos_token") if settings.exists() else None
    end = end.get("content") if isinstance(end, dict) else end
    say(f"tokenizer: {file}")
    return LanguageTokenizer(tokenizer, name=str(name), end=end)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the tokenizer's files of a checkpoint directory, unchanged."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)


def _tokenizer_file(name: str) -> Path:
    path = surviving(Path(name).expanduser())
    for place in (path, path / TOKENIZER_FILE, path / "best" / TOKENIZER_FILE):
        if place.is_file():
            return place
    folder, repository = NAMED.get(name, (name, name))
    root = os.environ.get("RESONANCE_DATA")
    if root and (Path(root, "tokenizers", folder) / TOKENIZER_FILE).is_file():
        return Path(root, "tokenizers", folder, TOKENIZER_FILE)
    return _from_hub(name, repository)


def _from_hub(name: str, repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(repository, TOKENIZER_FILE))
    except (HFValidationError, OSError) as error:  # the hub's HTTP and lookup errors are OSErrors
        reason = str(error).strip().splitlines()
        raise UserError(
            f"tokenizer {name!r} was not found: no file or folder of that name with a {TOKENIZER_FILE}, none "
            f"in $RESONANCE_DATA/tokenizers, and the hub: {(reason or [type(error).__name__])[0]}. Use "
            "data.tokenizer bpe, which is trained on the corpus."
        ) from error
