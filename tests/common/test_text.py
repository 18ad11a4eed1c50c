"""What a user may expect of the pair tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.text import PASSAGE, QUERY, PairTokenizer, bucket_for

WORDS = [
    "how",
    "to",
    "read",
    "a",
    "file",
    "open",
    "the",
    "path",
    "and",
    "close",
    "list",
    "sort",
    "key",
    "##s",
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
CLS, SEP = VOCABULARY.index("[CLS]"), VOCABULARY.index("[SEP]")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT tokenizer directory with a small vocabulary."""
    directory = tmp_path / "bert"
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return directory


def roberta(directory: Path) -> Path:
    """A RoBERTa-like directory: two separators between the texts, `<pad>` for padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS[:-1]) for _ in range(count))


def test_a_pair_is_laid_out_as_the_template_says(bert: Path) -> None:
    pair = PairTokenizer(bert).encode_pairs(["read a file"], ["open the path"])[0]
    expected = ["[CLS]", "read", "a", "file", "[SEP]", "open", "the", "path", "[SEP]"]
    assert [VOCABULARY[i] for i in pair.ids] == expected
    assert pair.sides.tolist() == [QUERY] * 5 + [PASSAGE] * 4
    assert pair.ids.dtype == np.int32
    assert pair.sides.dtype == np.int8


def test_another_familys_template_is_followed(tmp_path: Path) -> None:
    tokenizer = PairTokenizer(roberta(tmp_path / "roberta"))
    pair = tokenizer.encode_pairs(["read file"], ["open"])[0]
    assert pair.ids.tolist()[0] == 0
    assert pair.ids.tolist()[3:5] == [2, 2]
    assert pair.sides.tolist() == [1, 1, 1, 1, 1, 2, 2]
    assert tokenizer.pad_id == 1


def test_a_long_passage_costs_the_query_no_token_and_cuts_are_counted(bert: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    tokenizer = PairTokenizer(bert, max_query_tokens=5, max_passage_tokens=8)
    lengths = [(rng.randint(1, 9), rng.randint(1, 14)) for _ in range(40)]
    pairs = tokenizer.encode_pairs([words(rng, q) for q, _ in lengths], [words(rng, p) for _, p in lengths])
    for pair, (query, passage) in zip(pairs, lengths, strict=True):
        assert (pair.sides == QUERY).sum() == min(query, 5) + 2
        assert (pair.sides == PASSAGE).sum() == min(passage, 8) + 1
        assert pair.ids[-1] == SEP
        assert len(pair.ids) <= tokenizer.max_pair_length
    assert tokenizer.truncation.pairs == 40
    assert tokenizer.truncation.query_share == sum(q > 5 for q, _ in lengths) / 40
    assert tokenizer.truncation.passage_share == sum(p > 8 for _, p in lengths) / 40


def test_padding_is_side_zero_and_too_long_is_refused(bert: Path) -> None:
    tokenizer = PairTokenizer(bert)
    ids, sides = tokenizer.pad(tokenizer.encode_pairs(["a", "read a file"], ["file", "open"]), 12)
    assert ids.shape == sides.shape == (2, 12)
    assert sides[0].tolist() == [1, 1, 1, 2, 2] + [0] * 7
    assert (ids[sides == 0] == tokenizer.pad_id).all()
    with pytest.raises(ValueError, match="does not fit"):
        tokenizer.pad(tokenizer.encode_pairs(["read a file"], ["open"]), 6)


def test_single_texts_fit_the_limit_with_their_special_tokens(bert: Path) -> None:
    short, long = PairTokenizer(bert).encode_texts(["read a file", "a " * 50], max_tokens=8)
    assert [VOCABULARY[i] for i in short.ids] == ["[CLS]", "read", "a", "file", "[SEP]"]
    assert len(long.ids) == 8 and long.ids[0] == CLS and long.ids[-1] == SEP


def with_segments(directory: Path) -> Path:
    """Add a tokenizer.json whose pairs have segments 0 and 1, and the settings that hubs serve with it."""
    from tokenizers import BertWordPieceTokenizer, processors

    tokenizer = BertWordPieceTokenizer(str(directory / "vocab.txt"))._tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 512, "do_lower_case": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("segments", [False, True], ids=["vocab.txt", "tokenizer.json"])
def test_other_programs_read_a_saved_tokenizer_as_we_do(bert: Path, tmp_path: Path, segments: bool) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = PairTokenizer(with_segments(bert) if segments else bert, 10, 20)
    saved = tmp_path / "saved"
    tokenizer.save(saved)
    ours = tokenizer.encode_pairs(["read a file"], ["open the path"])[0].ids.tolist()
    theirs = AutoTokenizer.from_pretrained(str(saved))
    encoded = theirs("read a file", "open the path")
    assert encoded["input_ids"] == ours
    assert "token_type_ids" not in encoded
    assert theirs.model_max_length == tokenizer.max_pair_length == 33
    bare = Tokenizer.from_file(str(saved / "tokenizer.json")).encode("read a file", "open the path")
    assert (bare.ids, set(bare.type_ids)) == (ours, {0})
    assert PairTokenizer(saved).encode_pairs(["read a file"], ["open the path"])[0].ids.tolist() == ours


@pytest.mark.parametrize("segments", [False, True], ids=["vocab.txt", "tokenizer.json"])
def test_a_passage_of_segment_one_is_saved_as_such(bert: Path, tmp_path: Path, segments: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = PairTokenizer(with_segments(bert) if segments else bert)
    tokenizer.save(tmp_path / "saved", passage_segment=1)
    encoded = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))("read a file", "open the path")
    assert encoded["token_type_ids"] == [0] * 5 + [1] * 4


def test_a_directory_without_a_readable_tokenizer_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        PairTokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        PairTokenizer(tmp_path)


def test_a_token_that_the_model_has_no_row_for_is_refused(bert: Path) -> None:
    (bert / "config.json").write_text('{"vocab_size": 9}')
    tokenizer = PairTokenizer(bert)
    known = tokenizer.encode_texts(["", "zzzz"], 8)  # special tokens alone, the unknown one among them
    assert max(encoded.ids.max() for encoded in known) < 9
    with pytest.raises(UserError, match="gives 'key' the id 17, but the model has rows for ids 0 to 8"):
        tokenizer.encode_pairs(["key"], ["zzzz"])


def test_the_smallest_bucket_that_holds_a_length() -> None:
    assert [bucket_for(n, (64, 32, 128)) for n in (1, 32, 33, 128)] == [32, 32, 64, 128]
    with pytest.raises(UserError, match="length_buckets"):
        bucket_for(129, (32, 64, 128))


def sentencepiece_directory(directory: Path) -> Path:
    """A DeBERTa-v3 directory as the hub serves it: spm.model and no tokenizer.json."""
    library = pytest.importorskip("sentencepiece")
    directory.mkdir()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([*WORDS, "read a file", "open the path", "flag 1 2 A B"] * 20),
        model_prefix=str(directory / "spm"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **{f"{name}_id": number for number, name in enumerate(("pad", "bos", "eos", "unk"))},
        **{
            f"{name}_piece": piece
            for name, piece in (("pad", "[PAD]"), ("bos", "[CLS]"), ("eos", "[SEP]"), ("unk", "[UNK]"))
        },
    )
    (directory / "spm.vocab").unlink()
    (directory / "config.json").write_text('{"model_type": "deberta-v2"}')
    (directory / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    return directory


def test_a_sentencepiece_directory_reads_as_sentencepiece_does_and_is_saved_whole(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = sentencepiece_directory(tmp_path / "deberta")
    library = pytest.importorskip("sentencepiece")
    oracle = library.SentencePieceProcessor(model_file=str(directory / "spm.model"))
    tokenizer = PairTokenizer(directory)
    # white space, a ligature, a circled digit, full-width letters: only the character map folds them
    texts = ["read a file", "  open   the path ", "the ﬂag", "①", "ＡＢ\tlist"]
    encoded = tokenizer.encode_pairs(texts, texts)
    for pair, text in zip(encoded, texts, strict=True):
        ids = oracle.encode(text)
        assert 3 not in ids
        assert pair.ids.tolist() == [1, *ids, 2, *ids, 2]
        assert pair.sides.tolist() == [QUERY] * (len(ids) + 2) + [PASSAGE] * (len(ids) + 1)
    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")(texts, texts)["input_ids"]
    assert theirs == [pair.ids.tolist() for pair in encoded]
    again = PairTokenizer(tmp_path / "saved").encode_pairs(texts, texts)
    assert [pair.ids.tolist() for pair in again] == theirs


def test_the_tokenizer_of_deberta_v3_reads_as_sentencepiece_does(tmp_path: Path, data_dir: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    model = data_dir / "tokenizers" / "deberta-v3" / "spm.model"
    if not model.is_file():
        pytest.skip(f"no {model}")
    (tmp_path / "spm.model").write_bytes(model.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    oracle = library.SentencePieceProcessor(model_file=str(model))
    texts = ["What does `os.path.join` do?", "  naïve café…  №5 ﬁne\n\tＡＢ 한국어 日本語", "x" * 300]
    for text, encoded in zip(texts, PairTokenizer(tmp_path).encode_texts(texts, 400), strict=True):
        assert encoded.ids.tolist() == [1, *oracle.encode(text), 2]


def test_a_directory_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(UserError, match=r"holds no tokenizer; looked for tokenizer\.json, vocab\.txt, spm"):
        PairTokenizer(tmp_path)
