"""Tokenizers for query-passage pairs: separate limits, the family's own template, stated segments.

A pair reads `[CLS] query [SEP] passage [SEP]` (or the template of the checkpoint's family). Each token has a
side: 1 the query with its special tokens, 2 the passage with its own, 0 padding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.checkpoint import read_json
from common.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = np.ndarray  # int32 [S]

PADDING, QUERY, PASSAGE = 0, 1, 2
_PAD_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>")
_CONVERTED_FILES = (
    "spm.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "merges.txt",
)
_COPIED_FILES = (
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spm.model",
    "merges.txt",
    "vocab.json",
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One encoded text or pair: ids int32 [S], sides int8 [S] (1 query side, 2 passage side)."""

    ids: Ids
    sides: np.ndarray


@dataclass(frozen=True)
class Truncation:
    """How many pairs were encoded, and how many of them lost tokens of the query or of the passage."""

    pairs: int = 0
    queries: int = 0
    passages: int = 0

    @property
    def query_share(self) -> float:
        return self.queries / self.pairs if self.pairs else 0.0

    @property
    def passage_share(self) -> float:
        return self.passages / self.pairs if self.pairs else 0.0


class PairTokenizer:
    """The tokenizer of a checkpoint directory, for pairs (rerankers) and single texts (bi-encoders).

    The two limits count tokens without special ones and are separate: a long passage never costs the query
    a token.
    Raises UserError when the directory holds no tokenizer that can be read.
    """

    def __init__(
        self, directory: str | Path, max_query_tokens: int = 64, max_passage_tokens: int = 192
    ) -> None:
        if min(max_query_tokens, max_passage_tokens) < 1:
            raise UserError(
                f"max_query_tokens={max_query_tokens}, max_passage_tokens={max_passage_tokens}: "
                "both must be at least 1"
            )
        self.directory = Path(directory)
        self.max_query_tokens = max_query_tokens
        self.max_passage_tokens = max_passage_tokens
        self.truncation = Truncation()
        self._settings = _read_settings(self.directory)
        self._tokenizer = _load_tokenizer(self.directory, self._settings)
        self._pair_template = _template(self._tokenizer, pair=True)
        self._text_template = _template(self._tokenizer, pair=False)
        self.pad_id = self._find_pad_id()
        config = self.directory / "config.json"
        self._vocabulary = read_json(config).get("vocab_size") if config.exists() else None
        self._check_ids(np.concatenate((*self._pair_template, [self.pad_id])))

    @property
    def max_pair_length(self) -> int:
        """Longest pair that can come out, special tokens included."""
        return (
            self.max_query_tokens + self.max_passage_tokens + sum(len(part) for part in self._pair_template)
        )

    @property
    def described(self) -> dict[str, Any]:
        """The tokenizer as a tokenizer.json holds it."""
        found: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return found

    @property
    def truncated(self) -> str:
        """`truncation` in words."""
        return (
            f"truncated: {self.truncation.query_share:.1%} of queries (over {self.max_query_tokens} tokens), "
            f"{self.truncation.passage_share:.1%} of passages (over {self.max_passage_tokens})"
        )

    @property
    def own_passage_segment(self) -> int:
        """Segment id of a pair's second text, as the directory's own template and settings have it."""
        if "token_type_ids" not in self._settings.get("model_input_names", ["token_type_ids"]):
            return 0
        probe = self._tokenizer.encode("a", "a")
        return max(type_id for type_id, side in zip(probe.type_ids, probe.sequence_ids, strict=True) if side)

    def query_ids(self, queries: Sequence[str]) -> tuple[list[Ids], np.ndarray]:
        """Query sides of pairs, special tokens included, and bool [N]: which queries were truncated."""
        before, after, _ = self._pair_template
        return self._encode(queries, self.max_query_tokens, before, after)

    def passage_ids(self, passages: Sequence[str]) -> tuple[list[Ids], np.ndarray]:
        """Passage sides of pairs, special tokens included, and bool [N]: which passages were truncated."""
        return self._encode(passages, self.max_passage_tokens, _NO_IDS, self._pair_template[2])

    def encode_pairs(self, queries: Sequence[str], passages: Sequence[str]) -> list[Encoded]:
        """Encode the pairs (queries[i], passages[i]), each distinct text once; counts `truncation`."""
        if len(queries) != len(passages):
            raise ValueError(
                f"{len(queries)} queries for {len(passages)} passages: pairs need as many of each"
            )
        query_sides, query_cut = self.query_ids(queries)
        passage_sides, passage_cut = self.passage_ids(passages)
        self.count_truncation(len(queries), int(query_cut.sum()), int(passage_cut.sum()))
        return [join_pair(query, passage) for query, passage in zip(query_sides, passage_sides, strict=True)]

    def encode_texts(self, texts: Sequence[str], max_tokens: int) -> list[Encoded]:
        """Encode single texts to at most `max_tokens` ids, special tokens included; all on side 1."""
        before, after, _ = self._text_template
        room = max_tokens - len(before) - len(after)
        if room < 1:
            raise ValueError(f"max_tokens={max_tokens} leaves no room for text beside the special tokens")
        encoded, _ = self._encode(texts, room, before, after)
        return [Encoded(ids, np.full(len(ids), QUERY, np.int8)) for ids in encoded]

    def cut(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """The texts as far as their first `max_tokens` tokens reach, special ones not counted."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            text if len(encoding.ids) <= max_tokens else text[: encoding.offsets[max_tokens - 1][1]]
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def pad(self, encodeds: Sequence[Encoded], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Pad to (ids int32 [N, length], sides int8 [N, length]); ValueError when one is longer."""
        ids = np.full((len(encodeds), length), self.pad_id, np.int32)
        sides = np.zeros((len(encodeds), length), np.int8)
        for row, encoded in enumerate(encodeds):
            size = len(encoded.ids)
            if size > length:
                raise ValueError(f"a text of {size} tokens does not fit the padded length {length}")
            ids[row, :size] = encoded.ids
            sides[row, :size] = encoded.sides
        return ids, sides

    def count_truncation(self, pairs: int, queries: int, passages: int) -> None:
        """Add to `truncation`: pairs seen, and how many of them had a truncated query or passage."""
        seen = self.truncation
        self.truncation = replace(
            seen, pairs=seen.pairs + pairs, queries=seen.queries + queries, passages=seen.passages + passages
        )

    def save(self, directory: str | Path, passage_segment: int = 0) -> None:
        """Write the tokenizer files of a checkpoint directory.

        tokenizer.json gives `passage_segment` to the passage of a pair, and tokenizer_config.json asks for
        token types only when that is 1, so that every program feeds the model what it was trained on. Other
        programs cut a pair as a whole, at model_max_length; we cut query and passage apart. Their input is
        ours only for pairs that neither limit cuts.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        document = json.loads(self._tokenizer.to_str())
        document["post_processor"] = _with_segment(document["post_processor"], passage_segment)
        _write_json(target / "tokenizer.json", document)
        settings: dict[str, Any] = {"pad_token": self._tokenizer.id_to_token(self.pad_id)} | self._settings
        # a family's own class would build its tokenizer anew, without what tokenizer.json says
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        types = ["token_type_ids"] if passage_segment else []
        settings["model_input_names"] = ["input_ids", *types, "attention_mask"]
        settings["model_max_length"] = self.max_pair_length
        _write_json(target / "tokenizer_config.json", settings)
        for name in _COPIED_FILES:
            source = self.directory / name
            if source.is_file() and source.resolve() != (target / name).resolve():
                shutil.copyfile(source, target / name)

    def _encode(
        self, texts: Sequence[str], limit: int, before: Ids, after: Ids
    ) -> tuple[list[Ids], np.ndarray]:
        """Ids of each text cut to `limit`, between `before` and `after`; bool [N] says which were cut."""
        distinct = list(dict.fromkeys(texts))
        encodings = self._tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
        known: dict[str, tuple[Ids, bool]] = {}
        for text, encoding in zip(distinct, encodings, strict=True):
            ids = encoding.ids
            content = np.asarray(ids[:limit], np.int32)
            known[text] = (np.concatenate((before, content, after)), len(ids) > limit)
        self._check_ids(np.concatenate([_NO_IDS, *(ids for ids, _ in known.values())]))
        return [known[text][0] for text in texts], np.asarray([known[text][1] for text in texts], bool)

    def _check_ids(self, ids: np.ndarray) -> None:
        """UserError for a token that the model has no row for: looked up all the same, it is garbage."""
        if self._vocabulary is None or not len(ids) or ids.max() < self._vocabulary:
            return
        worst = int(ids.max())
        raise UserError(
            f"{self.directory}: its tokenizer gives {self._tokenizer.id_to_token(worst)!r} the id {worst}, "
            f"but the model has rows for ids 0 to {self._vocabulary - 1} (vocab_size in config.json). Put "
            "the tokenizer that the model was trained with beside it."
        )

    def _find_pad_id(self) -> int:
        named = self._settings.get("pad_token")
        named = named.get("content") if isinstance(named, dict) else named
        for token in (named, *_PAD_TOKENS):
            pad_id = self._tokenizer.token_to_id(token) if token else None
            if pad_id is not None:
                return int(pad_id)
        raise UserError(
            f"{self.directory}: the tokenizer has no padding token; name one of its tokens as "
            '"pad_token" in tokenizer_config.json'
        )


_NO_IDS: Ids = np.zeros(0, np.int32)


def join_pair(query: Ids, passage: Ids) -> Encoded:
    """One pair from its two sides, as `query_ids` and `passage_ids` give them."""
    sides = np.full(len(query) + len(passage), PASSAGE, np.int8)
    sides[: len(query)] = QUERY
    return Encoded(np.concatenate((query, passage)), sides)


def length_batches(
    encodeds: Sequence[Encoded], lengths: Sequence[int], budget: int, limit: int | None = None
) -> Iterator[tuple[np.ndarray, int, int]]:
    """(indices, rows, length) of batches: longest first, budget // length rows, padding included.

    The last batch, often a small one, is padded to a power of two instead. `limit` is the number of positions
    that the model has; beyond the usual lengths they double up to it.
    """
    sizes = np.asarray([len(encoded.ids) for encoded in encodeds], int)
    doubled = (lengths[-1] << n for n in range(1, 1 + (limit or 0).bit_length()))
    allowed = lengths if limit is None else (*(n for n in (*lengths, *doubled) if n < limit), limit)
    padded = np.asarray([next((n for n in allowed if n >= size), size) for size in sizes], int)
    order = np.argsort(-padded, kind="stable")
    start = 0
    while start < len(order):
        length = int(padded[order[start]])
        rows = max(1, budget // length)
        chosen = order[start : start + rows]
        yield chosen, min(rows, 1 << (len(chosen) - 1).bit_length()), length
        start += rows


def bucket_for(length: int, buckets: Sequence[int]) -> int:
    """The smallest of `buckets` (any order) that holds `length` tokens. UserError when none does."""
    fitting = [bucket for bucket in buckets if bucket >= length]
    if not fitting:
        raise UserError(
            f"a pair of {length} tokens is longer than every length bucket {tuple(buckets)}: add one of at "
            f"least {length} to data.length_buckets, or lower data.max_query_tokens or max_passage_tokens"
        )
    return min(fitting)


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); copy the file again from where the model came"
        ) from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(settings).__name__}")
    return settings


def _load_tokenizer(directory: Path, settings: dict[str, Any]) -> Tokenizer:
    """tokenizer.json; else WordPiece from vocab.txt; else what transformers converts (spm.model, BPE)."""
    if not directory.is_dir():
        raise UserError(
            f"{directory}: no such directory; a tokenizer needs a folder with tokenizer.json or vocab.txt"
        )
    tokenizer: Tokenizer
    if (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer as FastTokenizer

        tokenizer = _readable(directory / "tokenizer.json", lambda path: FastTokenizer.from_file(str(path)))
    elif (directory / "vocab.txt").is_file():
        tokenizer = _readable(directory / "vocab.txt", lambda path: _from_vocabulary(path, settings))
    elif any((directory / name).is_file() for name in _CONVERTED_FILES):
        tokenizer = _readable(directory, _through_transformers)
    else:
        raise UserError(
            f"{directory}: holds no tokenizer; looked for tokenizer.json, vocab.txt, "
            f"{', '.join(_CONVERTED_FILES)}. Copy the file from where the model came."
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _readable(path: Path, load: Callable[[Path], Tokenizer]) -> Tokenizer:
    try:
        return load(path)
    except Exception as error:  # the Rust library raises bare Exception, transformers raises many kinds
        raise UserError(
            f"{path}: cannot be read as a tokenizer ({error}); the folder needs a whole tokenizer.json or "
            "vocab.txt: copy the files again from where the model came"
        ) from error


def _from_vocabulary(path: Path, settings: dict[str, Any]) -> Tokenizer:
    from tokenizers import BertWordPieceTokenizer

    lowercase = bool(settings.get("do_lower_case", True))
    wordpiece: Tokenizer = BertWordPieceTokenizer(str(path), lowercase=lowercase)._tokenizer
    return wordpiece


def _through_transformers(directory: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    spm = directory / "spm.model"
    if spm.is_file():
        import sentencepiece  # noqa: F401  without it transformers asks for another library
    backend: Tokenizer = AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True
    ).backend_tokenizer
    if spm.is_file():
        _normalise_as_sentencepiece(backend, spm)
    return backend


def _normalise_as_sentencepiece(tokenizer: Tokenizer, spm: Path) -> None:
    """Give a converted DeBERTa tokenizer the character map of its SentencePiece model.

    transformers 5 leaves the map out, and what it folds (ligatures, full-width letters) becomes unknown.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, normalizers

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(spm.read_bytes())
    charsmap = model.normalizer_spec.precompiled_charsmap
    if charsmap:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Precompiled(charsmap), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        )


def _template(tokenizer: Tokenizer, pair: bool) -> tuple[Ids, Ids, Ids]:
    """Special ids before, between (or after a single text) and at the end, read off an encoded probe."""
    probe = tokenizer.encode("a", "a") if pair else tokenizer.encode("a")
    ids = np.asarray(probe.ids, np.int32)
    owners = probe.sequence_ids
    first = [i for i, owner in enumerate(owners) if owner == 0]
    second = [i for i, owner in enumerate(owners) if owner == 1] or [len(owners)]
    return ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :]


def _with_segment(processor: dict[str, Any] | None, passage: int) -> dict[str, Any] | None:
    """The same post-processor (as tokenizer.json writes it), a pair's second text with segment `passage`."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        return processor | {"processors": [_with_segment(part, passage) for part in processor["processors"]]}
    if processor["type"] == "BertProcessing":
        processor = _as_template(processor)
    if processor["type"] != "TemplateProcessing":
        return processor  # RobertaProcessing and ByteLevel give segment 0 already
    ids = [next(iter(item.values()))["id"] for item in processor["pair"]]
    pieces = [
        {kind: piece | {"type_id": passage if place >= ids.index("B") else 0} for kind, piece in item.items()}
        for place, item in enumerate(processor["pair"])
    ]
    return processor | {"pair": pieces}


def _as_template(processor: dict[str, Any]) -> dict[str, Any]:
    """BertProcessing written as TemplateProcessing, which alone states its segments."""
    (sep, sep_id), (cls, cls_id) = processor["sep"], processor["cls"]
    opening, closing = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (cls, sep))
    query, passage = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {
        token: {"id": token, "ids": [number], "tokens": [token]}
        for token, number in ((cls, cls_id), (sep, sep_id))
    }
    return {
        "type": "TemplateProcessing",
        "single": [opening, query, closing],
        "pair": [opening, query, closing, passage, closing],
        "special_tokens": special,
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", "utf-8")
