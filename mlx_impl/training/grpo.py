"""Group relative policy optimisation of a query expander: groups of completions, rewarded, against the SFT
model.

The reference is the model with the fresh adapter off, so the KL of step 0 is 0. Sources: Shao et al. 2024,
arXiv:2402.03300 (GRPO); Liu et al. 2025, 2503.20783 (dr_grpo); Yu et al. 2025, 2503.14476 (dapo); Zheng et
al. 2025, 2507.18071 (sequence ratio); tobi/qmd, finetune/experiments/grpo. No twin yet: JAX has no Qwen3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from common.data.language import padded_length
from common.errors import UserError
from common.expansion.config import GrpoConfig, PolicyConfig
from common.expansion.prompts import ExpansionPrompts
from common.expansion.qmd import Sampling
from common.metrics.expansion import score
from common.metrics.significance import bootstrap_interval, paired_randomisation
from common.training import Notes
from mlx_impl.models.qwen import (
    ADAPTER_FILE,
    LanguageModel,
    adapter_tensors,
    continued_states,
    head,
    without_adapter,
)
from mlx_impl.training.adapters import AdapterTrainer, Logged
from mlx_impl.training.generation import Continuation, greedy

PROMPT_PADDED_TO = 16  # few shapes are compiled; prompts differ by the query alone
LEAST_SPREAD = 1e-6  # a group whose rewards differ by less gives no signal
Reward = Callable[[Sequence[tuple[str, str]]], Sequence[float]]  # (query, completion) pairs -> a number each


class Completions(NamedTuple):
    """N completions of P prompts as arrays; a prompt is read once for all of its own."""

    prompts: mx.array  # [P, S]: without their last tokens, padded in front with 0
    padding: mx.array  # [P]: how much
    rows: mx.array  # [N]: the prompt of each
    ids: mx.array  # [N, T + 1]: the prompt's last token and the completion, padded behind with 0
    mask: mx.array  # [N, T]: which tokens of the completion count
    advantages: mx.array  # [N]
    weights: mx.array  # [N, T]: what a token's loss counts in the step's


class GrpoTrainer(AdapterTrainer):
    """A GRPO run: `queries` are asked in a shuffled order. Of the `held_out` ones evaluation.queries, at most
    half, choose best/; on as many others it is compared with its start at the end.

    `rewards` maps a name to (weight, function); their weighted sum is the reward. UserError when the rewards
    of grpo.patience steps in a row never differ within a group, or the KL runs away.
    """

    evaluates_start = True

    def __init__(
        self,
        config: GrpoConfig,
        loaded: LanguageModel,
        prompts: ExpansionPrompts,
        queries: Sequence[str],
        held_out: Sequence[str],
        rewards: Mapping[str, tuple[float, Reward]],
        *,
        data_name: str,
        say: Callable[[str], None] = print,
    ) -> None:
        self.settings, self.prompts, self.rewards = config, prompts, rewards
        cut = min(config.evaluation.queries, max(1, len(held_out) // 2))
        self.queries, self.held_out = list(queries), list(held_out[:cut])
        self.test = list(held_out[cut:][: config.evaluation.queries])
        training, policy = config.training, config.grpo
        self.asked = config.completions // policy.num_generations
        self.per_epoch = max(1, len(self.queries) // self.asked)
        if len(self.queries) < self.asked or not self.held_out:
            raise UserError(
                f"the data has {len(self.queries)} training and {len(held_out)} validation queries; a "
                f"step asks {self.asked}, and an evaluation needs one. Give more rows."
            )
        steps = max(1, round(training.epochs * self.per_epoch))
        steps = min(steps, training.max_steps or steps)
        super().__init__(config, loaded, {"name": data_name}, steps, updates=policy.num_iterations, say=say)
        temperature = config.generation.temperature
        self._log_probs = make_log_probs(self.model, temperature)
        self._reference = make_log_probs(self.model, temperature)  # traced with the adapter off
        checkpoint = config.training.grad_checkpoint
        self._gradient = make_gradient(self.model, policy, temperature, checkpoint)

    def train_step(self, step: int) -> Logged:
        """Ask, reward, and update grpo.num_iterations times."""
        began = time.perf_counter()
        queries = self.ask(step)
        written = self.complete(queries, step)
        parts = self.reward(queries, written)
        total = self._weighed(parts)
        generated = time.perf_counter() - began
        advantages, silent = group_advantages(total, self.settings.grpo)
        batches = self._parts(queries, written, advantages)
        seed = self.settings.training.seed * 1_000_003 + step
        before = [self._before(batch, seed) for batch in batches]
        logged = self._update(batches, before, seed)
        self._guard(step, silent, logged["kl"])
        tokens = sum(len(row.ids) for row in written)
        return {
            "reward": float(total.mean()),
            "reward_std": float(total.std()),
            **{f"reward_{name}": float(values.mean()) for name, values in parts.items()},
            **logged,
            "no_signal": silent,
            "truncated": float(np.mean([not row.ended for row in written])),
            "invalid": float(np.mean(self._invalid(queries, written))),
            "length": tokens / len(written),
            "learning_rate": float(self.rate((step - 1) * self.settings.grpo.num_iterations)),
            "tokens_per_second": tokens / generated,
            "completions_per_second": len(written) / (time.perf_counter() - began),
        }

    def ask(self, step: int) -> list[str]:
        """The queries of a step, numbered from 1, each as often as it is answered."""
        epoch, place = divmod(step - 1, self.per_epoch)
        order = np.random.default_rng((self.settings.training.seed, epoch)).permutation(len(self.queries))
        chosen = order[place * self.asked : (place + 1) * self.asked]
        return [self.queries[i] for i in chosen for _ in range(self.settings.grpo.num_generations)]

    def complete(self, queries: Sequence[str], step: int) -> list[Continuation]:
        """A completion of each; `queries` holds each one num_generations times in a row."""
        policy = self.settings.grpo
        self.model.eval()
        written = self.answers(
            queries[:: policy.num_generations],
            self._sampling(),
            policy.num_generations,
            seed=self.settings.training.seed * 1_000_003 + step,
            batch_size=self.settings.completions,
        )
        self.model.train()
        return written

    def _sampling(self) -> Sampling:
        chosen, limit = self.settings.generation, self.settings.grpo.max_completion_length
        return Sampling(
            chosen.temperature, chosen.top_k, chosen.top_p, presence_penalty=0.0, max_tokens=limit
        )

    def reward(self, queries: Sequence[str], written: Sequence[Continuation]) -> dict[str, np.ndarray]:
        """Each part of the reward, [N], by name."""
        pairs = [(query, self.prompts.decode(row.ids)) for query, row in zip(queries, written, strict=True)]
        return {name: np.asarray(function(pairs), float) for name, (_, function) in self.rewards.items()}

    def _weighed(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.sum([self.rewards[name][0] * values for name, values in parts.items()], axis=0)

    def evaluate(self) -> Logged:
        """Mean reward of greedy expansions of held-out queries, as `score`, and its parts."""
        written = self.answers(self.held_out, greedy(self.settings.evaluation.max_tokens))
        parts = self.reward(self.held_out, written)
        logged = {
            "score": float(self._weighed(parts).mean()),
            "ended": float(np.mean([row.ended for row in written])),
        }
        return logged | {f"reward_{name}": float(values.mean()) for name, values in parts.items()}

    def _summary(self, notes: Notes) -> dict[str, Any]:
        """The reward of best/ beside its start's, on held-out queries that did not choose it."""
        if not self.test:
            return {}
        final = adapter_tensors(self.loaded)
        self.model.load_weights(str(self.folder.best / ADAPTER_FILE), strict=False)
        self.model.eval()
        limit, copies = self.settings.evaluation.max_tokens, self.settings.grpo.num_generations
        found: dict[str, Any] = {"queries": len(self.test), "samples": copies}
        for name, sampling, each in (("sampled", self._sampling(), copies), ("greedy", greedy(limit), 1)):
            asked = [query for query in self.test for _ in range(each)]
            written = self.answers(self.test, sampling, each)
            with without_adapter(self.model):
                before = self.answers(self.test, sampling, each)
            ours, start = (self._weighed(self.reward(asked, rows)) for rows in (written, before))
            found[name] = _gain(ours.reshape(-1, each).mean(axis=1), start.reshape(-1, each).mean(axis=1))
            if name == "sampled":
                found["kl"] = self._kl(asked, written)
        self.model.load_weights(list(final.items()), strict=False)
        self.say(gain_text(found))
        return {"held_out": found}

    def _kl(self, queries: Sequence[str], written: Sequence[Continuation]) -> float:
        """Mean k3 KL to the start over the tokens of completions that the model drew itself.

        Computed without the compiled functions of a step: these keep the dropout that they were traced with.
        """
        batches = self._parts(queries, written, np.zeros(len(written)))
        temperature, found = self.settings.generation.temperature, []
        for batch in batches:
            own, _ = log_probs(self.model, batch, temperature)
            with without_adapter(self.model):
                reference, _ = log_probs(self.model, batch, temperature)
            apart = reference - own
            found.append(mx.exp(apart) - apart - 1)
            mx.eval(found[-1])
        return _mean(found, [batch.mask for batch in batches])

    def _invalid(self, queries: Sequence[str], written: Sequence[Continuation]) -> list[bool]:
        texts = (self.prompts.decode(row.ids) for row in written)
        return [
            not text.strip() or score(query, text).percentage == 0
            for query, text in zip(queries, texts, strict=True)
        ]

    def _parts(
        self, queries: Sequence[str], written: Sequence[Continuation], advantages: np.ndarray
    ) -> list[Completions]:
        """Forward passes of training.batch_size rows; the weights of all of them make one loss."""
        policy, size = self.settings.grpo, self.settings.training.batch_size
        end = [self.prompts.end_id]
        rows = [
            (self.asked_as(query), [*row.ids, *(end if row.ended else [])])
            for query, row in zip(queries, written, strict=True)
        ]
        counts = [
            0 if policy.mask_truncated_completions and not row.ended else len(ids)
            for row, (_, ids) in zip(written, rows, strict=True)
        ]
        weights = token_weights(counts, policy, size)
        parts = [slice(first, first + size) for first in range(0, len(rows), size)]
        limit = policy.max_completion_length
        return [_padded(rows[part], counts[part], weights[part], advantages[part], limit) for part in parts]

    def _before(self, batch: Completions, seed: int) -> tuple[mx.array | None, mx.array]:
        """Log-probabilities [N, T] before the update, None where it is the only one, and of the reference.

        Dropout's mask is that of the first update: the ratio measures the update alone.
        """
        old = None
        if self.settings.grpo.num_iterations > 1:
            mx.random.seed(seed)
            old = self._log_probs(batch)
            mx.eval(old)
        with without_adapter(self.model):
            reference = self._reference(batch)
            mx.eval(reference)
        return old, reference

    def _update(
        self, batches: Sequence[Completions], before: Sequence[tuple[mx.array | None, mx.array]], seed: int
    ) -> Logged:
        """The updates of one step; what is logged is of the first but for `clipped`, of the last."""
        logged: Logged = {}
        tokens = max(1, sum(int(batch.mask.sum()) for batch in batches))
        for iteration in range(self.settings.grpo.num_iterations):
            sums, gradients = np.zeros(4), None
            for batch, (old, reference) in zip(batches, before, strict=True):
                mx.random.seed(seed)
                values, found = self._gradient(batch, old, reference)
                gradients = found if gradients is None else tree_map(mx.add, gradients, found)
                mx.eval(values, gradients)
                sums += [float(value) for value in values]
            norm = float(self.update(gradients))
            loss, (kl, clipped, entropy) = sums[0], sums[1:] / tokens
            if iteration == 0:
                logged = {"loss": loss, "kl": kl, "entropy": entropy, "gradient_norm": norm}
            logged["clipped"] = clipped
        return logged

    def _guard(self, step: int, silent: float, kl: float) -> None:
        policy = self.settings.grpo
        lines = [line["no_signal"] for line in self.folder.read_metrics("train")[-(policy.patience - 1) :]]
        lines = lines if policy.patience > 1 else []
        if silent == 1 and len(lines) == policy.patience - 1 and all(share == 1 for share in lines):
            raise UserError(
                f"step {step}: for {policy.patience} steps no group's rewards differed, so nothing can be "
                "learned. Raise generation.temperature or grpo.num_generations, choose another reward, or "
                "train the SFT model longer."
            )
        if kl > policy.max_kl:
            raise UserError(
                f"step {step}: the KL to the SFT model is {kl:.3g}, above grpo.max_kl ({policy.max_kl}): "
                "the model runs away. Lower training.learning_rate or raise grpo.beta, then start over "
                "with --fresh; best/ holds the best adapter so far."
            )


def _gain(ours: np.ndarray, start: np.ndarray) -> dict[str, float]:
    """Mean rewards [Q], their difference with a bootstrap interval, and p of paired randomisation."""
    low, high = bootstrap_interval(ours, start)
    means = {"best": float(ours.mean()), "start": float(start.mean())}
    apart = {"difference": float((ours - start).mean()), "low": low, "high": high}
    return means | apart | {"p": paired_randomisation(ours, start)}


def gain_text(found: Mapping[str, Any]) -> str:
    """What `_summary` found, in lines."""
    lines = [f"reward on {found['queries']} held-out queries that did not choose best/, against its start:"]
    drawn = {"sampled": f"sampled, {found['samples']} answers each", "greedy": "greedy"}
    for name, words in drawn.items():
        row = found[name]
        lines.append(
            f"  {words}: {row['start']:.4f} -> {row['best']:.4f}, {row['difference']:+.4f} "
            f"[{row['low']:+.4f}, {row['high']:+.4f}], p = {row['p']:.2g}"
        )
    return "\n".join([*lines, f"  KL to the start: {found['kl']:.4f} a token"])


def group_advantages(rewards: np.ndarray, policy: PolicyConfig) -> tuple[np.ndarray, float]:
    """Advantages [N] of rewards [N], those of a group in a row, and the share of groups without signal.

    Reward minus the group's mean, divided by its standard deviation where `scale_rewards` says so (never in
    dr_grpo); 0 in a group whose rewards do not differ.
    """
    groups = rewards.reshape(-1, policy.num_generations)
    spread = groups.std(axis=1, ddof=1, keepdims=True)
    silent = spread < LEAST_SPREAD
    centred = groups - groups.mean(axis=1, keepdims=True)
    scaled = policy.scale_rewards and policy.loss_type != "dr_grpo"
    advantages = centred / (spread + 1e-4) if scaled else centred
    return np.where(silent, 0.0, advantages).reshape(-1), float(silent.mean())


def token_weights(counts: Sequence[int], policy: PolicyConfig, batch_size: int) -> np.ndarray:
    """What each token of N completions with `counts` counted tokens weighs in the loss, [N].

    grpo: 1 / (N x its completion's tokens); dr_grpo: 1 / (N x max_completion_length); dapo: 1 / all tokens;
    bnpo: 1 / (batches x tokens of its batch of `batch_size`). A completion without counted tokens weighs 0.
    """
    lengths = np.asarray(counts, float)
    if policy.loss_type == "grpo":
        return 1.0 / (len(lengths) * np.maximum(lengths, 1))
    if policy.loss_type == "dr_grpo":
        return np.full(len(lengths), 1.0 / (len(lengths) * policy.max_completion_length))
    if policy.loss_type == "dapo":
        return np.full(len(lengths), 1.0 / max(1.0, lengths.sum()))
    starts = range(0, len(lengths), batch_size)
    tokens = np.repeat([lengths[at : at + batch_size].sum() for at in starts], batch_size)[: len(lengths)]
    return 1.0 / (len(starts) * np.maximum(tokens, 1))


def log_probs(
    model: Any, batch: Completions, temperature: float, *, checkpoint: bool = False
) -> tuple[mx.array, mx.array]:
    """Of the completions' tokens, their log-probabilities and the entropies they were drawn with, without a
    gradient, [N, T].
    """
    prompts = batch.prompts, batch.padding, batch.rows
    hidden = continued_states(model, *prompts, batch.ids[:, :-1], checkpoint=checkpoint)  # [N, T, D]
    logits = head(model, hidden)  # [N, T, V]
    logits = logits.astype(mx.float32) / temperature
    chosen = mx.take_along_axis(logits, batch.ids[:, 1:, None], axis=-1)[..., 0]
    fixed = mx.stop_gradient(logits)
    likely = mx.softmax(fixed, axis=-1)  # once, for the norm, its gradient and the entropy
    norm = fixed.max(axis=-1) - mx.log(likely.max(axis=-1))  # [N, T]
    entropy = norm - (likely * fixed).sum(axis=-1)
    return chosen - norm - (likely * (logits - fixed)).sum(axis=-1), entropy


def policy_loss(
    new: mx.array, old: mx.array, reference: mx.array, batch: Completions, policy: PolicyConfig
) -> tuple[mx.array, mx.array, mx.array]:
    """The clipped loss, weighed, with beta times the k3 KL; the summed KL; tokens whose clip acts.

    All log-probabilities [N, T]. Per token: -min(ratio A, clip(ratio) A) + beta (e^d - d - 1) with
    d = reference - new. With importance_sampling_level `sequence` the ratio is e^(mean over the completion
    of new - old).
    """
    difference = (new - old) * batch.mask
    if policy.importance_sampling_level == "sequence":
        mean = difference.sum(axis=-1, keepdims=True) / mx.maximum(batch.mask.sum(axis=-1, keepdims=True), 1)
        difference = mx.broadcast_to(mean, difference.shape)
    ratio = mx.exp(difference)
    high = policy.epsilon if policy.epsilon_high is None else policy.epsilon_high
    clipped = mx.clip(ratio, 1 - policy.epsilon, 1 + high)
    advantage = batch.advantages[:, None]
    plain, bounded = ratio * advantage, clipped * advantage
    apart = (reference - new) * batch.mask
    kl = mx.exp(apart) - apart - 1
    loss = ((policy.beta * kl - mx.minimum(plain, bounded)) * batch.weights).sum()
    acts = (bounded < plain) & batch.mask
    return loss, (kl * batch.mask).sum(), acts.sum()


def make_log_probs(model: Any, temperature: float) -> Callable[[Completions], mx.array]:
    """The log-probabilities of `log_probs`, compiled."""

    @partial(mx.compile, inputs=[model.state, mx.random.state], outputs=[mx.random.state])
    def run(*batch: mx.array) -> mx.array:
        return log_probs(model, Completions(*batch), temperature)[0]

    return lambda batch: run(*batch)


Found = tuple[tuple[mx.array, ...], Any]


def make_gradient(
    model: Any, policy: PolicyConfig, temperature: float, checkpoint: bool = False
) -> Callable[[Completions, mx.array | None, mx.array], Found]:
    """A compiled (batch, old, reference) -> what policy_loss returns and the summed entropy, and the gradient
    of the loss. Without `old` the model is where it was: the ratio is 1, its gradient that of the policy.
    """

    def total(batch: Completions, old: mx.array | None, reference: mx.array) -> tuple[mx.array, ...]:
        new, entropy = log_probs(model, batch, temperature, checkpoint=checkpoint)
        old = mx.stop_gradient(new) if old is None else old
        return *policy_loss(new, old, reference, batch, policy), (entropy * batch.mask).sum()

    value_and_gradient = nn.value_and_grad(model, total)
    captured = [model.state, mx.random.state]

    @partial(mx.compile, inputs=captured, outputs=[mx.random.state])
    def gradient(old: mx.array | None, reference: mx.array, *batch: mx.array) -> Found:
        before = model.trainable_parameters()
        found = value_and_gradient(Completions(*batch), old, reference)
        model.update(before)  # else what the trace has put there would stay
        return found

    return lambda batch, old, reference: gradient(old, reference, *batch)


def _padded(
    rows: Sequence[tuple[list[int], list[int]]],
    counts: Sequence[int],
    weights: np.ndarray,
    advantages: np.ndarray,
    limit: int,
) -> Completions:
    """Rows of a prompt's and a completion's tokens, the latter at most `limit`."""
    prompts: dict[tuple[int, ...], int] = {}  # each once, and its row
    numbers = [prompts.setdefault(tuple(prompt), len(prompts)) for prompt, _ in rows]
    length = padded_length(max(1, *(len(prompt) - 1 for prompt in prompts)), PROMPT_PADDED_TO)
    read = np.zeros((len(prompts), length), np.int32)
    padding = np.array([length + 1 - len(prompt) for prompt in prompts])
    for row, (known, left) in enumerate(zip(prompts, padding, strict=True)):
        read[row, left:] = known[:-1]
    new = min(padded_length(max(1, *(len(ids) for _, ids in rows))), limit)
    ids = np.zeros((len(rows), 1 + new), np.int32)
    for row, (prompt, completion) in enumerate(rows):
        ids[row, : 1 + len(completion)] = [prompt[-1], *completion]
    mask = mx.array(np.arange(new) < np.array(counts)[:, None])
    return Completions(
        mx.array(read),
        mx.array(padding),
        mx.array(numbers),
        mx.array(ids),
        mask,
        mx.array(advantages, mx.float32),
        mask * mx.array(weights[:, None], mx.float32),
    )


def _mean(values: Sequence[mx.array], masks: Sequence[mx.array]) -> float:
    total = sum(float((value * mask).sum()) for value, mask in zip(values, masks, strict=True))
    return total / max(1, sum(int(mask.sum()) for mask in masks))
