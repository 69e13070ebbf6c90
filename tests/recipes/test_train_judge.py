"""How the embedded judge is made: held-out worlds, labels, the card's figures, a tiny run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from minigrid.envs import DoorKeyEnv

from recipes.train_judge import __main__ as train_judge
from recipes.train_judge.card import clip_batches, cut, doorkey_episodes, figures, static_states
from recipes.train_judge.data import (
    EVENT_NAMES,
    LABEL_VIEW,
    VIEW,
    Clip,
    ClipSampler,
    Episode,
    draw_spec,
)
from recipes.train_judge.model import build_model, build_processor, normalise
from recipes.train_judge.worlds import RandomRoom, could_be_doorkey, random_world
from vlmrb_torchrl.scorers import HuggingFaceScorer


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return train_judge.collect(30, np.random.default_rng(0), lambda *_: None)


def counting_episode(length: int, goal: bool, doors: tuple[int, ...]) -> Episode:
    """An episode whose state t is the number t, with a door opened in the given transitions."""
    states = np.zeros((length + 1, 5, 5, 4), np.uint8)
    states[:, 0, 0, 0] = np.arange(length + 1)
    events = np.zeros((length, len(EVENT_NAMES)), bool)
    events[-1, 0] = goal
    events[list(doors), 1] = True
    return Episode(states, events)


@pytest.mark.parametrize("size", [5, 6, 8, 12, 16])
def test_every_doorkey_layout_is_recognised_as_held_out(size: int) -> None:
    world = DoorKeyEnv(size=size)
    for seed in range(20):
        world.reset(seed=seed)
        assert could_be_doorkey(world.grid.encode())


def test_random_rooms_are_never_doorkey_layouts_but_do_hold_doors_keys_and_goals() -> None:
    found = set()
    for seed in range(100):
        world = RandomRoom(6 + seed % 8, 6 + seed % 8)
        world.reset(seed=seed)
        assert not could_be_doorkey(world.grid.encode())
        found |= {thing.type for thing in world.grid.grid if thing}
    assert {"door", "key", "goal", "wall"} <= found


def test_a_room_that_doorkey_could_have_drawn_is_drawn_again() -> None:
    class Unlucky(RandomRoom):
        drawn = 0

        def _draw(self, width: int, height: int) -> None:
            super()._draw(width, height)
            self.drawn += 1
            if self.drawn == 1:
                world = DoorKeyEnv(size=6)
                world.reset(seed=0)
                self.grid = world.grid

    world = Unlucky(6, 6)
    world.reset(seed=0)
    assert world.drawn == 2
    assert not could_be_doorkey(world.grid.encode())


def test_training_never_constructs_doorkey() -> None:
    random = np.random.default_rng(0)
    assert not any(isinstance(random_world(random), DoorKeyEnv) for _ in range(300))
    for name in ("worlds", "data", "training"):
        assert "DoorKeyEnv" not in Path(train_judge.__file__).with_name(f"{name}.py").read_text()


def test_frames_of_a_clip_are_the_states_that_its_transitions_lead_to() -> None:
    clip = Clip(counting_episode(20, True, ()), first=4, transitions=8, frames=4)
    assert clip.episode.states[clip.rows][:, 0, 0, 0].tolist() == [6, 8, 10, 12]


def test_door_opened_before_the_first_frame_happened_but_is_not_visible() -> None:
    """Of 8 transitions shown as 4 frames the first frame is the outcome of transition 1."""
    for moment, shown in ((0, False), (1, False), (2, True), (7, True)):
        clip = Clip(counting_episode(8, False, (moment,)), 0, 8, 4)
        assert clip.events.any(0)[1]
        assert clip.visible()[1] == shown
        marks = clip.visible_by_frame()[:, 1]
        assert marks.tolist() == [shown and moment // 2 == j for j in range(4)]


def test_goal_is_marked_in_every_frame_that_shows_it_padding_included() -> None:
    clip = Clip(counting_episode(2, True, ()), 0, 2, 4)
    assert clip.visible_by_frame()[:, 0].tolist() == [False, True, True, True]


def test_sampler_gives_the_answer_asked_for_and_stays_inside_the_episode(
    episodes: list[Episode],
) -> None:
    sampler = ClipSampler(episodes, np.random.default_rng(1))
    for k in range(90):
        question, answer = k % 3, bool(k // 3 % 2)
        clip = sampler.draw(question, answer, *draw_spec(sampler.random, 32))
        assert clip.visible()[question] == answer
        assert clip.first >= 0
        assert 1 <= clip.transitions <= len(clip.episode) - clip.first


def test_clips_of_a_cut_cover_every_transition_once(episodes: list[Episode]) -> None:
    covered = {id(episode): 0 for episode in episodes}
    for clip in cut(episodes, 32, 32):
        covered[id(clip.episode)] += clip.transitions
    assert list(covered.values()) == [len(episode) for episode in episodes]


def test_events_agree_with_the_states(episodes: list[Episode]) -> None:
    """The goal is reached exactly where the agent's cell turns into a goal."""
    for episode in episodes:
        states = episode.states[episode.rows]
        on_goal = ((states[..., 0] == 8) & (states[..., 3] > 0)).any((1, 2))
        assert episode.events[:, 0].tolist() == on_goal[1:].tolist()


def test_label_view_sees_the_agent_where_the_picture_has_it(episodes: list[Episode]) -> None:
    state = torch.from_numpy(episodes[0].states[:1])
    _, agent, _ = LABEL_VIEW(state)[0]
    assert agent.sum() == 1
    row, column = (int(v) for v in agent.nonzero()[0])
    tile = VIEW(state)[0][:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
    assert (tile[0] > 200).any()  # the agent is red


def test_static_states_hold_one_agent_on_a_cell_that_can_be_stood_on() -> None:
    states = list(static_states(5, 1))
    assert len({s.tobytes() for s in states}) == len(states)
    for state in states:
        kind = state[..., 0][state[..., 3] > 0]
        assert len(kind) == 1
        assert kind[0] in (1, 4, 8)


def test_figures_count_against_what_happened() -> None:
    score = np.array([0.9, 0.9, 0.1, 0.1])
    label = np.array([True, False, True, False])
    shown = np.array([True, False, False, False])
    found = {name: share[0] for name, share in figures(score, label, shown).items()}
    expected = {"precision": 0.5, "recall": 0.5, "recall where shown": 1, "false Yes": 0.5}
    assert found == {**expected, "AUC": 0.5}


def test_training_normalises_frames_as_the_processor_does() -> None:
    frames = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    processor = build_processor()
    given = processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    torch.testing.assert_close(normalise(frames), given["pixel_values_videos"][0])


def test_a_run_in_miniature_writes_a_judge_that_the_scorer_loads(tmp_path: Path) -> None:
    out = tmp_path / "judge"
    train_judge.main(out, episodes=10, frame_steps=2, event_steps=2, answer_steps=2, examine=False)
    clips = next(clip_batches(cut(doorkey_episodes(5, 2, 0), 32, 4), batch=3))
    score = HuggingFaceScorer(out)(clips)["score"]
    assert score.shape == (3,)
    assert json.loads((out / "training.json").read_text())["steps"]["frames"] == 2
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupted_save_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    class Interrupting:
        def save_pretrained(self, folder: Path) -> None:
            raise KeyboardInterrupt

    processor = build_processor()
    model = build_model(processor, vision_width=32, vision_layers=1, width=32, layers=1)
    out = tmp_path / "judge"
    out.mkdir()
    (out / "model.safetensors").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        train_judge.save(model, Interrupting(), {}, out)
    assert [p.name for p in tmp_path.iterdir()] == ["judge"]
    assert (out / "model.safetensors").read_text() == "old"
