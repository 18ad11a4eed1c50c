"""What loading a reranker means in either backend: the start of a base, its head's settings, what is refused.

Three starts of a reranker, read off the checkpoint (DESIGN section 3): a sentence encoder begins with its own
resonance, an existing cross-encoder as it was, a plain masked language model from nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common import keymap
from common.checkpoint import CONFIG_FILE, HEAD_FILE, read_config, read_json, write_checkpoint
from common.config import FIDELITY_BLOCKS, HEAD_PROJECTORS, ModelConfig, RerankerConfig
from common.errors import UserError
from common.text import PairTokenizer

WARM_GAMMA = 20.0  # the scale that sentence-transformers trains cosines with
EVEN_COSINE = 0.5  # where a pointwise loss sees an even bet at the warm start
COLD_SPREAD = 0.02  # standard deviation of u from nothing, BERT's own initializer_range
# key of the `resonance` part of config.json -> its choices, or the least number of its type
_ALLOWED: dict[str, tuple[str, ...] | float] = {
    "head": tuple(HEAD_PROJECTORS),
    "parameterisation": ("cartesian", "polar"),
    "precision": ("auto", "float32", "bfloat16"),
    "state_size": 1,
    "passage_segment": 0,
    "max_query_tokens": 1,
    "max_passage_tokens": 1,
    "fusion_weight": 0.0,
}

Arrays = dict[str, np.ndarray]


def is_ours(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether a run wrote the directory. UserError when its head, or what describes it, is missing."""
    has_head, described = (directory / HEAD_FILE).exists(), isinstance(config.get("resonance"), Mapping)
    if has_head == described:
        return has_head
    lost = f"its config.json has no object `resonance` beside {HEAD_FILE}"
    if not has_head:
        lost = f"a run wrote it, but {HEAD_FILE}, the head of its full score, is missing"
    raise UserError(f"{directory}: {lost}. Copy the whole directory again, or use another checkpoint.")


def check_pooling(directory: Path) -> None:
    """Refuse what sentence-transformers wrote for another pooling: its vectors would be wrong in silence."""
    file = directory / "1_Pooling" / "config.json"
    modes = read_json(file) if file.exists() else {}
    used = [key for key, value in modes.items() if key.startswith("pooling_mode_") and value is True]
    used += [modes["pooling_mode"]] if "pooling_mode" in modes else []
    if used and used not in (["pooling_mode_mean_tokens"], ["mean"], [["mean"]]):
        raise UserError(
            f"{directory}: pools by {', '.join(map(str, used))}, and encoders here pool by the mean. "
            "Choose one that does; as --model.base it can begin with --model.start masked_lm."
        )


def choose_start(directory: Path, family: keymap.Family, tensors: Arrays, wanted: str = "auto") -> str:
    """Which of the three starts a base gets, unless the recipe names one.

    Raises UserError for a classifier of several labels: a reranker has one.
    """
    *before, output = family.head
    labels = tensors[f"{output}.weight"].shape[0] if f"{output}.weight" in tensors else None
    if labels is not None and labels != 1:
        raise UserError(
            f"{directory}: its classifier has {labels} labels, a reranker has 1. Choose a base encoder, or a "
            "cross-encoder with num_labels 1."
        )
    lacking = [part for part in family.head if f"{part}.weight" not in tensors]
    if lacking and (wanted == "cross_encoder" or (wanted == "auto" and labels == 1)):
        raise UserError(
            f"{directory}: a cross-encoder's score is {output} of {' of '.join(reversed(before))}, but there "
            f"is no {' and no '.join(lacking)} to begin with. Choose another --model.start or --model.base."
        )
    if wanted != "auto":
        return wanted
    if labels == 1:
        return "cross_encoder"
    return "sentence_encoder" if (directory / "modules.json").exists() else "masked_lm"


def head_settings(directory: Path, sizes: Any, model: ModelConfig, start: str) -> dict[str, Any]:
    """The `resonance` part of config.json for a base that begins now; UserError for a segment it lacks."""
    last = max(sizes.type_vocab_size - 1, 0)
    segment: int = model.passage_segment or 0
    if segment > last:
        raise UserError(
            f"model.passage_segment is {segment}, but the model in {directory} has no segment above {last}. "
            "Leave the setting out."
        )
    if model.passage_segment is None and start == "cross_encoder":  # which begins as it was
        segment = min(PairTokenizer(directory).own_passage_segment, last)
    width = model.complex_width or sizes.hidden_size
    if model.head == "block_fidelity" and width % FIDELITY_BLOCKS:
        raise UserError(
            f"model.head block_fidelity cuts a state into {FIDELITY_BLOCKS} blocks, and this one has a width "
            f"of {width}: choose a multiple for model.complex_width."
        )
    return {
        "head": model.head,
        "state_size": width,
        "parameterisation": model.projector,
        "passage_segment": segment,
    }


def head_start(settings: Mapping[str, Any], start: str) -> str:
    """How u, gamma and b begin: a sentence encoder's, under a head that reads no state, as from nothing."""
    return "masked_lm" if start == "sentence_encoder" and settings["head"] == "cls" else start


def stored_settings(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The `resonance` part of the config.json of a directory that we wrote; the first ones name no head.

    UserError for values that are not allowed there.
    """
    settings = {"head": ModelConfig.head, **config.get("resonance", {})}
    wrong = [
        f"{key} is {settings[key]!r}; allowed: {_in_words(allowed)}"
        for key, allowed in _ALLOWED.items()
        if key in settings and not _fits(settings[key], allowed)
    ]
    if not wrong and settings["head"] == "block_fidelity" and settings.get("state_size", 0) % FIDELITY_BLOCKS:
        wrong = [f"state_size is {settings['state_size']}; allowed: multiples of {FIDELITY_BLOCKS}"]
    if wrong:
        raise UserError(
            f"{directory / CONFIG_FILE}: in its `resonance` part {'; '.join(wrong)}. Copy the file again, or "
            "load it with the version that wrote it."
        )
    return settings


def _fits(value: Any, allowed: tuple[str, ...] | float) -> bool:
    if isinstance(allowed, tuple):
        return value in allowed
    number = isinstance(value, int | type(allowed)) and not isinstance(value, bool)
    return number and allowed <= value <= sys.float_info.max


def _in_words(allowed: tuple[str, ...] | float) -> str:
    if isinstance(allowed, tuple):
        return ", ".join(allowed)
    return f"a {'whole ' if isinstance(allowed, int) else ''}number >= {allowed:g}"


def stored_precision(directory: Path, recipe: RerankerConfig) -> str:
    """What a checkpoint of ours was trained and measured in; the recipe's for a base."""
    config = read_config(directory)
    settings = stored_settings(config, directory) if isinstance(config.get("resonance"), Mapping) else {}
    return str(settings.get("precision", recipe.train.precision))


def check_unchanged(settings: Mapping[str, Any], model: ModelConfig, directory: Path) -> None:
    """Refuse a recipe that asks of a directory that we wrote another head than it has."""
    default = ModelConfig()
    wanted = {
        "model.head": (model.head, default.head, "head"),
        "model.complex_width": (model.complex_width, default.complex_width, "state_size"),
        "model.projector": (model.projector, default.projector, "parameterisation"),
        "model.passage_segment": (model.passage_segment, default.passage_segment, "passage_segment"),
    }
    differ = [
        f"{name} is {value!r}, the checkpoint has {settings.get(key)!r}"
        for name, (value, usual, key) in wanted.items()
        if value not in (usual, settings.get(key))
    ]
    if differ:
        raise UserError(f"{directory} was written by a run and keeps its head: {'; '.join(differ)}.")


def is_head(key: str) -> bool:
    """Whether a checkpoint key is the resonance head's, which has a file of its own."""
    return key.startswith("resonance.")


def longest_input(directory: Path) -> int:
    """The longest input that a sentence-transformers directory was trained with; 256 when it does not say."""
    file = directory / "sentence_bert_config.json"
    return int(read_json(file).get("max_seq_length") or 256) if file.exists() else 256


def write_reranker(
    directory: Path,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    tensors: Arrays,
    *,
    training: Mapping[str, Any],
    tokenizer_save: Callable[[Path, int], None],
    card: str,
) -> None:
    """Write a reranker's directory from its base's config, its head's settings and all its tensors.

    `tokenizer_save` writes the tokenizer into a directory, for passages of the given segment.
    """
    head = {key.removeprefix("resonance."): value for key, value in tensors.items() if is_head(key)}
    portable = {key: value for key, value in tensors.items() if not is_head(key)}
    written = {key: value for key, value in config.items() if not key.startswith("_")}
    written |= {
        "architectures": [keymap.family_of(written, directory).architecture],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "num_labels": 1,
        "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
        "resonance": settings,
    }
    write_checkpoint(
        directory,
        config=written,
        tensors=portable,
        resonance=head,
        training=training,
        tokenizer_save=lambda place: tokenizer_save(place, int(settings["passage_segment"])),
        card=card,
    )
