"""Training of the embedded judge: frames first, then what happens between them, then questions.

1. The vision tower learns to say what a frame shows (where the agent is, what it stands on and
   faces, where keys, doors and goals lie), each frame's one token through throw-away heads.
2. The vision tower is frozen and every distinct frame embedded once. The language model reads
   the frame tokens alone and learns to mark the frames at which something happened.
3. The questions join: the answer's first token is trained, the marks kept as a second loss.

B: batch, F: frames of a clip, E: events, S: tokens of a turn, D: width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.train_judge.data import (
    CELL_CLASSES,
    EVENT_NAMES,
    KEY,
    LABEL_VIEW,
    ON_GOAL,
    OPEN_DOOR,
    SHUT_DOOR,
    Clip,
    ClipSampler,
    draw_spec,
    render,
)
from recipes.train_judge.model import PARAPHRASES, normalise, prompt_ids

Log = Callable[[str, int, int, dict[str, float]], None]
"""Called after each step: stage, step, steps of the stage, what was measured in it."""
FRAME_BATCH, EVENT_BATCH, ANSWER_BATCH = 256, 64, 48
# A step size that a model of half a million parameters bears; found by short runs.
RATE = 3e-3
ANSWER_RATE = 1.5e-3
SHARE_OF_YES = 0.4
"""Of the training clips: under one half, since a false Yes costs replay more than a false No."""
MARKED_LAYER = 2
"""Marks are read after the second of three layers; the third carries them to the answer."""
MAPPED = (OPEN_DOOR, SHUT_DOOR, KEY, ON_GOAL)
CELLS = 64
STEPS_X = torch.tensor([1, 0, -1, 0])
STEPS_Y = torch.tensor([0, 1, 0, -1])


class Training:
    """Trains ``model`` in place; stages, in this order: frames, embed, events, answers.

    The generator of ``sampler`` drives every draw of the run; ``log`` is told about every step.
    """

    def __init__(self, model: Any, processor: Any, sampler: ClipSampler, log: Log) -> None:
        self.model = model
        self.processor = processor
        self.sampler = sampler
        self.random = sampler.random
        self.log = log
        self.states = [state for episode in sampler.episodes for state in episode.states]
        sizes = [len(episode.states) for episode in sampler.episodes]
        self.offset = dict(zip(map(id, sampler.episodes), np.cumsum([0, *sizes]), strict=False))
        self.tokens = torch.empty(0)  # of each of the states, in their order
        self.turns: dict[tuple[str, int], Tensor] = {}
        self.marks = nn.Linear(model.config.text_config.hidden_size, len(EVENT_NAMES))

    def frames(self, steps: int) -> None:
        """Stage 1: the vision tower and the projector, on single frames."""
        heads = FrameHeads(self.marks.in_features)
        descent = _Descent(
            [self.model.model.vision_tower, self.model.model.multi_modal_projector, heads],
            RATE,
            steps,
        )
        self.model.train()
        for step in range(steps):
            states = edited_states(self.states, self.random, FRAME_BATCH)
            tokens = self._frame_tokens(render(states))
            loss, means = heads.losses(tokens, render(states, LABEL_VIEW))
            descent.step(loss)
            self.log("frames", step, steps, means)

    @torch.no_grad()
    def embed(self) -> None:
        """Compute the token of every distinct frame, once; the vision tower is done."""
        self.model.eval()
        chunks = np.array_split(np.arange(len(self.states)), max(1, len(self.states) // 512))
        tokens = []
        for k, numbers in enumerate(chunks):
            tokens.append(self._frame_tokens(render([self.states[n] for n in numbers])))
            self.log("embedding", k, len(chunks), {})
        self.tokens = torch.cat(tokens)

    def _frame_tokens(self, frames: Tensor) -> Tensor:
        """Tokens of uint8 frames, float32 ``[B, D]``."""
        output = self.model.model.get_image_features(normalise(frames)[None])
        tokens: Tensor = output.pooler_output[:, 0]
        return tokens

    def events(self, steps: int) -> None:
        """Stage 2: frame tokens alone, each frame's event marked."""
        language = self.model.model.language_model
        descent = _Descent([language, self.marks], RATE, steps)
        self.model.train()
        for step in range(steps):
            clips, _, _ = self._draw(EVENT_BATCH, 8 if step < steps // 5 else 32)
            rows, target = self._rows_and_marks(clips)
            output = language(
                inputs_embeds=self.tokens[rows], output_hidden_states=True, use_cache=False
            )
            marked = self.marks(output.hidden_states[MARKED_LAYER])
            loss = _mark_loss(marked, target)
            descent.step(loss)
            right = ((marked.amax(1) > 0) == (target.amax(1) > 0)).float()  # of each clip
            self.log("events", step, steps, {"loss": loss.item(), "right": right.mean().item()})

    def answers(self, steps: int) -> None:
        """Stage 3: whole turns, the answer's first token."""
        descent = _Descent([self.model.model.language_model, self.marks], ANSWER_RATE, steps)
        tokenizer = self.processor.tokenizer
        yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No"))
        self.model.train()
        for step in range(steps):
            longest = 8 if step < steps // 6 else 32 if step < steps // 2 else 64
            clips, questions, answers = self._draw(ANSWER_BATCH, longest)
            rows, target = self._rows_and_marks(clips)
            ids = self._asked(questions, clips[0].frames)
            output = self._forward(ids, rows)
            said = output.logits[:, -1]
            loss = F.cross_entropy(said, torch.where(answers, yes, no))
            seen = output.hidden_states[MARKED_LAYER][ids == self.processor.video_token_id]
            mark_loss = _mark_loss(self.marks(seen).view(*target.shape), target)
            descent.step(loss + mark_loss)
            right = ((said[:, yes] > said[:, no]) == answers).float()
            means = {"loss": loss.item(), "marks": mark_loss.item()}
            for k, name in enumerate(EVENT_NAMES):
                means[name] = right[questions == k].mean().item()
            self.log("answers", step, steps, means)

    def _asked(self, questions: Tensor, frames: int) -> Tensor:
        """Left-padded token ids, int64 ``[B, S]``; half of the questions are in canonical words."""
        rows = []
        for question in questions.tolist():
            ways = PARAPHRASES[EVENT_NAMES[question]]
            way = ways[0] if self.random.random() < 0.5 else str(self.random.choice(ways))
            if (way, frames) not in self.turns:
                self.turns[way, frames] = prompt_ids(self.processor, way, frames)
            rows.append(self.turns[way, frames])
        longest = max(map(len, rows))
        pad = self.processor.tokenizer.pad_token_id
        return torch.stack([F.pad(row, (longest - len(row), 0), value=pad) for row in rows])

    def _forward(self, ids: Tensor, rows: Tensor) -> Any:
        # Not handed over as mm_encoder_outputs, which transformers before 5.23 ignores.
        words = self.model.get_input_embeddings()(ids)
        seen = (ids == self.processor.video_token_id)[..., None]
        return self.model(
            inputs_embeds=words.masked_scatter(seen, self.tokens[rows]),
            attention_mask=(ids != self.processor.tokenizer.pad_token_id).long(),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        )

    def _draw(self, count: int, longest: int) -> tuple[list[Clip], Tensor, Tensor]:
        """Clips of one frame count, the question to each (int64 ``[B]``), its answer (bool)."""
        transitions, frames = draw_spec(self.random, longest)
        questions = self.random.integers(0, len(EVENT_NAMES), count)
        answers = self.random.random(count) < SHARE_OF_YES
        clips = [
            self.sampler.draw(int(q), bool(a), transitions, frames)
            for q, a in zip(questions, answers, strict=True)
        ]
        return clips, torch.from_numpy(questions), torch.from_numpy(answers)

    def _rows_and_marks(self, clips: list[Clip]) -> tuple[Tensor, Tensor]:
        """Frame numbers, int64 ``[B, F]``, and what each frame shows, float32 ``[B, F, E]``."""
        rows = np.stack([self.offset[id(clip.episode)] + clip.rows for clip in clips])
        marks = np.stack([clip.visible_by_frame() for clip in clips])
        return torch.from_numpy(rows), torch.from_numpy(marks).float()


def _mark_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Loss of the event marks ``[B, F, E]``; one frame in ten or so has a mark."""
    return F.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.tensor(3.0))


class _Descent:
    """AdamW with a warm-up of 50 steps and a cosine down to nothing, gradients clipped at 1."""

    def __init__(self, parts: list[nn.Module], rate: float, steps: int) -> None:
        self.parameters = [p for part in parts for p in part.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)
        )

        def schedule(step: int) -> float:
            return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)

    def step(self, loss: Tensor) -> None:
        """One update."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()


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
        """Sum of the read-outs' losses of tokens ``[B, D]``, and each one's share of hits.

        ``cells`` is what ``LABEL_VIEW`` drew of the same states, uint8 ``[B, 3, 8, 8]``.
        """
        kind, agent, heading = (cells[:, k].long().flatten(1) for k in range(3))
        here = agent.argmax(1)
        rows = torch.arange(len(here))
        facing = heading[rows, here]
        x, y = here % 8 + STEPS_X[facing], here // 8 + STEPS_Y[facing]
        inside = (x >= 0) & (x < 8) & (y >= 0) & (y < 8)
        ahead = kind[rows, (y.clamp(0, 7) * 8 + x.clamp(0, 7))] * inside
        maps = torch.stack([kind == k for k in MAPPED], 1).flatten(1).float()
        said = {
            "under": (self.under(token), kind[rows, here], 2),
            "front": (self.front(token), ahead, 2),
            "position": (self.position(token), here, 1),
            "direction": (self.direction(token), facing, 1),
        }
        loss = sum(
            weight * F.cross_entropy(logits, target) for logits, target, weight in said.values()
        )
        said_maps = self.maps(token)
        weight = torch.tensor(6.0)  # one cell in thirty holds such a thing
        loss = loss + 4 * F.binary_cross_entropy_with_logits(said_maps, maps, pos_weight=weight)
        means = {"loss": loss.item()}
        for name, (logits, target, _) in said.items():
            means[name] = (logits.argmax(1) == target).float().mean().item()
        means["map"] = ((said_maps > 0) == (maps > 0)).all(1).float().mean().item()
        return loss, means


def edited_states(
    known: list[np.ndarray], random: np.random.Generator, count: int
) -> list[np.ndarray]:
    """States of the episodes, seven in ten with the agent put elsewhere, often at a goal.

    An episode shows its goal reached once at most; put there, the agent is seen on a goal from
    every side, and just as often beside it.
    """
    states = []
    for number in random.integers(0, len(known), count):
        state = known[number]
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
