"""Training of the embedded judge: frames first, then what happens between them, then questions.

1. The vision tower learns to say what a frame shows (where the agent is, what it stands on and
   faces, where keys, doors and goals lie), each frame's one token through throw-away heads.
2. The vision tower is frozen and every distinct frame embedded once. The language model reads
   the frame tokens alone and learns to mark the frames at which something happened.
3. The questions join: the answer's first token is trained, the marks kept as a second loss.

B: batch, F: frames of a clip, S: tokens of a sequence, D: width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.judge_data import (
    CELL_CLASSES,
    EVENT_NAMES,
    KEY,
    LABEL_VIEW,
    ON_GOAL,
    OPEN_DOOR,
    SHUT_DOOR,
    VIEW,
    Clip,
    ClipSampler,
    FrameTable,
    draw_spec,
    visible,
    visible_by_frame,
)
from recipes.judge_model import normalise, prompt_ids
from recipes.judge_questions import PARAPHRASES

Log = Callable[[str, int, int, dict[str, float]], None]
"""Called after each step with the stage's name, the step, the number of steps and the means."""
MAPPED = (OPEN_DOOR, SHUT_DOOR, KEY, ON_GOAL)
CELLS = 64
_RATE = 3e-3
STEPS_X = torch.tensor([1, 0, -1, 0])
STEPS_Y = torch.tensor([0, 1, 0, -1])


class FrameHeads(nn.Module):
    """Linear read-outs of a frame's token; only the vision stage uses them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position = nn.Linear(width, CELLS)
        self.direction = nn.Linear(width, 4)
        self.under = nn.Linear(width, CELL_CLASSES)
        self.front = nn.Linear(width, CELL_CLASSES)
        self.maps = nn.Linear(width, len(MAPPED) * CELLS)

    def losses(self, token: Tensor, cells: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Sum of the read-outs' losses.

        Args:
            token: Frame tokens, float32 ``[B, D]``.
            cells: What ``LABEL_VIEW`` drew of the same states, uint8 ``[B, 3, 8, 8]``.
        """
        kind, agent, heading = (cells[:, k].long().flatten(1) for k in range(3))
        here = agent.argmax(1)
        rows = torch.arange(len(here))
        facing = heading[rows, here]
        x, y = here % 8 + STEPS_X[facing], here // 8 + STEPS_Y[facing]
        inside = (x >= 0) & (x < 8) & (y >= 0) & (y < 8)
        ahead = kind[rows, (y.clamp(0, 7) * 8 + x.clamp(0, 7))] * inside
        maps = torch.stack([kind == k for k in MAPPED], 1).flatten(1).float()
        under = self.under(token)
        front = self.front(token)
        weight = torch.tensor(6.0)  # one cell in thirty holds such a thing
        loss = (
            F.cross_entropy(self.position(token), here)
            + F.cross_entropy(self.direction(token), facing)
            + 2 * F.cross_entropy(under, kind[rows, here])
            + 2 * F.cross_entropy(front, ahead)
            + 4 * F.binary_cross_entropy_with_logits(self.maps(token), maps, pos_weight=weight)
        )
        seen = (self.maps(token) > 0) == (maps > 0)
        on_goal = kind[rows, here] == ON_GOAL
        return loss, {
            "loss": float(loss.detach()),
            "position": float((self.position(token).argmax(1) == here).float().mean()),
            "direction": float((self.direction(token).argmax(1) == facing).float().mean()),
            "under": float((under.argmax(1) == kind[rows, here]).float().mean()),
            "front": float((front.argmax(1) == ahead).float().mean()),
            "map": float(seen.all(1).float().mean()),
            "goal": float(((under.argmax(1) == ON_GOAL) == on_goal).float().mean()),
        }


def edited_states(table: FrameTable, random: np.random.Generator, count: int) -> list[np.ndarray]:
    """States of the episodes, half of them with the agent put elsewhere, often at a goal.

    An episode shows its goal reached once at most; put there, the agent is seen on a goal from
    every side, and just as often beside it.
    """
    states = []
    for number in random.integers(0, len(table), count):
        owner = int(np.searchsorted(table.offset, number, side="right") - 1)
        state = table.episodes[owner].states[number - table.offset[owner]]
        if random.random() < 0.7:
            state = _moved_agent(state.copy(), random)
        states.append(state)
    return states


def _moved_agent(state: np.ndarray, random: np.random.Generator) -> np.ndarray:
    goals = np.argwhere(state[..., 0] == 8)
    free = np.argwhere((state[..., 0] == 1) | (state[..., 0] == 3))
    choice = random.random()
    if len(goals) and choice < 0.15 and len(free):  # the goal somewhere else
        old, new = goals[0], free[int(random.integers(len(free)))]
        state[old[0], old[1], :3] = (1, 0, 0)
        state[new[0], new[1], :3] = (8, 1, 0)
        goals = new[None]
    inside = np.array(state.shape[:2]) - 1
    cell = None
    if len(goals) and choice < 0.45:
        cell = goals[int(random.integers(len(goals)))]
    elif len(goals) and choice < 0.75:
        cell = goals[0] + random.choice([(1, 0), (-1, 0), (0, 1), (0, -1)])
    elif len(free):
        cell = free[int(random.integers(len(free)))]
    if cell is not None and (cell > 0).all() and (cell < inside).all():
        state[..., 3] = 0
        state[cell[0], cell[1], 3] = 1 + int(random.integers(4))
    return state


def render_mixed(states: list[np.ndarray], renderer: Any) -> Tensor:
    """Draw states of different grid sizes, uint8 ``[B, 3, H, W]``."""
    frames: list[Tensor] = [torch.empty(0)] * len(states)
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for k, state in enumerate(states):
        by_shape.setdefault(state.shape, []).append(k)
    for places in by_shape.values():
        drawn = renderer(torch.from_numpy(np.stack([states[k] for k in places])))
        for k, frame in zip(places, drawn, strict=True):
            frames[k] = frame
    return torch.stack(frames)


def train_vision(
    model: Any, table: FrameTable, random: np.random.Generator, steps: int, log: Log
) -> None:
    """Stage 1, in place."""
    heads = FrameHeads(model.config.text_config.hidden_size)
    parts = [model.model.vision_tower, model.model.multi_modal_projector, heads]
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    for step in range(steps):
        _set_rate(optimizer, _RATE, step, steps)
        states = edited_states(table, random, 256)
        token = frame_tokens(model, render_mixed(states, VIEW))[:, 0]
        loss, means = heads.losses(token, render_mixed(states, LABEL_VIEW))
        _descend(optimizer, loss, parameters)
        log("frames", step, steps, means)


def frame_tokens(model: Any, frames: Tensor) -> Tensor:
    """Tokens of uint8 frames, float32 ``[B, tokens, D]``."""
    tokens: Tensor = model.model.get_image_features(normalise(frames)[None]).pooler_output
    return tokens


@torch.no_grad()
def embed_table(model: Any, table: FrameTable, log: Log) -> Tensor:
    """Tokens of every distinct frame, float32 ``[len(table), tokens, D]``."""
    model.eval()
    chunks = np.array_split(np.arange(len(table)), max(1, len(table) // 1024))
    tokens = []
    for k, numbers in enumerate(chunks):
        tokens.append(frame_tokens(model, table.render(numbers)))
        log("embedding", k, len(chunks), {})
    return torch.cat(tokens)


def train_events(
    model: Any,
    marks: nn.Linear,
    table: FrameTable,
    tokens: Tensor,
    sampler: ClipSampler,
    steps: int,
    log: Log,
) -> None:
    """Stage 2, in place: frame tokens alone, each frame's event marked."""
    language = model.model.language_model
    parameters = [*language.parameters(), *marks.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    for step in range(steps):
        _set_rate(optimizer, _RATE, step, steps)
        clips, _, _ = draw_batch(sampler, 64, 8 if step < steps // 4 else 32)
        rows, target = _rows_and_marks(table, clips)
        embeddings = tokens[rows][:, :, 0]
        states = language(inputs_embeds=embeddings, output_hidden_states=True, use_cache=False)
        logits = marks(states.hidden_states[_MARKED_LAYER])
        loss, means = mark_loss(logits, target)
        _descend(optimizer, loss, parameters)
        log("events", step, steps, means)


_MARKED_LAYER = 2
"""Marks are read after the second layer: the third carries them to the answer."""


def mark_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss of per-frame event marks, both ``[B, F, E]``."""
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.tensor(4.0))
    means = {"loss": float(loss.detach())}
    for k, name in enumerate(EVENT_NAMES):
        said, true = logits[..., k].amax(1) > 0, target[..., k].amax(1) > 0
        means[name] = float((said == true).float().mean())
    return loss, means


def train_answers(
    model: Any,
    marks: nn.Linear,
    processor: Any,
    table: FrameTable,
    tokens: Tensor,
    sampler: ClipSampler,
    steps: int,
    log: Log,
) -> None:
    """Stage 3, in place: whole turns, the answer's first token."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    language = model.model.language_model
    parameters = [*language.parameters(), *marks.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.01, betas=(0.9, 0.98))
    asked = _Questions(processor)
    yes, no = (processor.tokenizer.encode(w, add_special_tokens=False)[0] for w in ("Yes", "No"))
    model.train()
    for step in range(steps):
        _set_rate(optimizer, 1.5e-3, step, steps)
        longest = 8 if step < steps // 5 else 32 if step < steps // 2 else 64
        clips, questions, answers = draw_batch(sampler, 48, longest)
        rows, target = _rows_and_marks(table, clips)
        ids, mask = asked.batch(questions, clips[0].frames, sampler.random)
        video = BaseModelOutputWithPooling(pooler_output=tokens[rows].flatten(0, 1))
        out = model(
            input_ids=ids,
            attention_mask=mask,
            mm_encoder_outputs={"video": video},
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        )
        said = out.logits[:, -1]
        wanted = torch.where(answers, yes, no)
        seen = out.hidden_states[_MARKED_LAYER][ids == processor.video_token_id]
        extra, means = mark_loss(marks(seen).view(*target.shape), target)
        answer_loss = F.cross_entropy(said, wanted)
        _descend(optimizer, answer_loss + extra, parameters)
        right = (said[:, yes] > said[:, no]) == answers
        means = {"loss": float(answer_loss.detach()), "marks": means["loss"]}
        for k, name in enumerate(EVENT_NAMES):
            means[name] = float(right[questions == k].float().mean())
        log("answers", step, steps, means)


class _Questions:
    """Left-padded token ids of randomly phrased questions."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.cache: dict[tuple[str, int], Tensor] = {}

    def batch(
        self, questions: Tensor, frames: int, random: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        rows = []
        for question in questions.tolist():
            ways = PARAPHRASES[EVENT_NAMES[question]]
            way = ways[0] if random.random() < 0.5 else str(random.choice(ways))
            if (way, frames) not in self.cache:
                self.cache[way, frames] = prompt_ids(self.processor, way, frames)
            rows.append(self.cache[way, frames])
        longest = max(len(row) for row in rows)
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.stack([F.pad(row, (longest - len(row), 0), value=pad) for row in rows])
        return ids, (ids != pad).long()


def draw_batch(sampler: ClipSampler, count: int, longest: int) -> tuple[list[Clip], Tensor, Tensor]:
    """Clips of one frame count, the question put to each (int64 ``[B]``), its answer (bool)."""
    transitions, frames = draw_spec(sampler.random, longest)
    questions = sampler.random.integers(0, len(EVENT_NAMES), count)
    answers = sampler.random.random(count) < 0.5
    clips = [
        sampler.draw(int(q), bool(a), transitions, frames)
        for q, a in zip(questions, answers, strict=True)
    ]
    return clips, torch.from_numpy(questions), torch.from_numpy(answers)


def _rows_and_marks(table: FrameTable, clips: list[Clip]) -> tuple[Tensor, Tensor]:
    rows = np.stack([table.rows(clip) for clip in clips])
    marks = [visible_by_frame(table.episodes[clip.episode], clip) for clip in clips]
    return torch.from_numpy(rows), torch.from_numpy(np.stack(marks)).float()


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Warm up over 50 steps, then fall to nothing along a cosine."""
    rate = peak * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def _descend(
    optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[nn.Parameter]
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


__all__ = [
    "embed_table", "train_answers", "train_events", "train_vision", "visible",
]  # fmt: skip
