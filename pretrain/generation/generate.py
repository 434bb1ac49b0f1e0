"""Generate: continue prompts of pictures, sounds and text with text.

    temperature 0     the most likely token
    temperature t     softmax(logits / t), cut to the smallest set of most likely tokens with mass >= top_p

Tokens that no text encodes to (markers, placeholders, pad, bos, unknown) are never drawn; eos ends a row. Every row
draws from a random stream of its own, seeded by (seed, number of the prompt), so that what a prompt becomes does not
depend on which prompts are beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triweave.data_pipeline.stream.prompt import PromptPart, prompt_batch
from triweave.data_pipeline.text.tokenizer import Tokenizer
from triweave.pretrain.checkpoints.load import LoadedRun
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.generation.continuation import Continuation

SEED_LIMIT = 2**63
BATCH_ROWS = 64
"""Prompts that are continued together; more wait, which bounds the memory and changes no result."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one prompt became.

    text: the new text alone. tokens: its ids, without eos. finish_reason: "eos", or "length" after max_tokens.
    prompt_tokens: length of the prompt, bos and media included.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Mass of the most likely tokens that are drawn from; 1 is all of them."""
    seed: int = 0
    """Of the random streams, one for each prompt."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise PretrainError(f"temperature is {self.temperature}; it must be 0 (most likely token) or above")
        if not 0 < self.top_p <= 1:
            raise PretrainError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.seed < SEED_LIMIT:
            raise PretrainError(f"seed is {self.seed}; it must be in [0, 2**63)")

    def stream(self, number: int) -> torch.Generator:
        """Return the random stream of prompt `number`."""
        digest = hashlib.blake2b(f"{self.seed}:{number}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest))


def generate(
    run: LoadedRun,
    prompts: Sequence[Sequence[PromptPart]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    cache: bool = True,
    batch_rows: int = BATCH_ROWS,
) -> list[Generation]:
    """Return what the model makes of each prompt: at most `max_tokens` tokens of text, up to eos.

    prompts: any lengths and modalities, text and media in any order (`data_pipeline.stream.prompt`).
    cache: keep keys and values; without it every position is computed again for every token, for comparison.
    batch_rows: prompts that are continued together.
    Raises PretrainError for options out of range or a model without a language-model head, and the errors of
    `prompt_batch` for the prompts.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    if max_tokens < 1 or batch_rows < 1:
        name, value = ("max_tokens", max_tokens) if max_tokens < 1 else ("batch_rows", batch_rows)
        raise PretrainError(f"{name} is {value}; it must be at least 1")
    if "language_model" not in run.model.heads:
        raise PretrainError(
            f"{run.run_dir} was trained for {', '.join(run.config.model.objectives)} and writes no text; "
            "train with model.objectives.language_model"
        )
    done: list[Generation] = []
    for first in range(0, len(prompts), batch_rows):
        done += _generate_batch(run, prompts[first : first + batch_rows], first, max_tokens, sampling, cache=cache)
    return done


def draw(logits: Tensor, sampling: Sampling, streams: Sequence[torch.Generator]) -> Tensor:
    """Return one token per row of logits [B, V], int64 [B] on the CPU; ties go to the smaller id.

    streams: the random stream of each row; one number is drawn from it unless the temperature is 0.
    Raises PretrainError for logits that are NaN or infinite; -inf is a token that cannot be drawn.
    """
    logits = logits.detach().to("cpu", torch.float64)
    if not (logits < math.inf).all():  # NaN fails it too
        raise PretrainError("the model's logits are not numbers: its training diverged; load an earlier checkpoint")
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    # after the largest is taken off, so that a tiny temperature cannot overflow
    mass = torch.softmax((ordered - ordered[:, :1]) / sampling.temperature, dim=-1)
    before = mass.cumsum(-1) - mass
    through = (mass * (before < sampling.top_p)).cumsum(-1)
    numbers = torch.stack([torch.rand(1, generator=stream, dtype=torch.float64) for stream in streams])
    # through is constant behind the last token that is kept, and a number below its end falls on one that is
    place = torch.searchsorted(through, numbers * through[:, -1:], right=True)
    last = (through < through[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, torch.minimum(place, last)).squeeze(-1)


def _generate_batch(
    run: LoadedRun,
    prompts: Sequence[Sequence[PromptPart]],
    first: int,
    max_tokens: int,
    sampling: Sampling,
    *,
    cache: bool,
) -> list[Generation]:
    """Continue a batch whose prompts have the numbers `first`, `first` + 1, ..."""
    packed = prompt_batch(prompts, tokenizer=run.tokenizer, geometry=run.config.data.geometry)
    streams = [sampling.stream(first + number) for number in range(len(prompts))]
    made: list[list[int]] = [[] for _ in prompts]
    finished = ["length"] * len(prompts)
    with torch.inference_mode():
        continuation = Continuation(run.model, packed, cache=cache)
        prompt_tokens = (packed.kv_hi > packed.kv_lo).sum(1).tolist()
        forbidden = _forbidden(run.tokenizer, continuation.logits)
        rows = list(range(len(prompts)))
        for count in range(1, max_tokens + 1):
            tokens = draw(continuation.logits + forbidden, sampling, [streams[row] for row in rows])
            going = []
            for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
                if token == run.tokenizer.eos_id:
                    finished[row] = "eos"
                else:
                    made[row].append(token)
                    going.append(place)
            if not going or count == max_tokens:
                break
            if len(going) < len(rows):
                continuation.keep(going)
                rows, tokens = [rows[place] for place in going], tokens[going]
            continuation.append(tokens)
    return [
        Generation(
            text=run.tokenizer.decode(made[row]),
            tokens=made[row],
            finish_reason=finished[row],
            prompt_tokens=prompt_tokens[row],
        )
        for row in range(len(prompts))
    ]


def _forbidden(tokenizer: Tokenizer, logits: Tensor) -> Tensor:
    """Return what to add to logits [B, V]: -inf at tokens that no text has, 0 at all others and at eos; [V]."""
    forbidden = logits.new_zeros(logits.shape[-1])
    forbidden[sorted(tokenizer.unwritable - {tokenizer.eos_id})] = -math.inf
    return forbidden
