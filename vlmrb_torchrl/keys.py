"""Every TensorDict key that this package adds or relies on, in the order of the data's road.

B is a batch, N the slots of a buffer, F the frames shown of a clip, E the events that a
simulator can report.

| key | dtype, shape | unit | written by | read by |
|---|---|---|---|---|
| ``render_state`` | set by the environment; MiniGrid: uint8 ``[B, W, H, 4]``, OGBench: uint8 ``[B, 298]`` | cell codes; bytes of the physics | environment (root and next) | renderer |
| ``("next", "events")`` | bool ``[B, E]`` | happened in this transition | environment | privileged scorer, logging |
| ``index`` | int64 ``[B]`` | slot | buffer | clip cutter, priority updates |
| ``index_generation`` | int64 ``[B]`` | how often what the slot held was replaced | buffer | late writes |
| ``clip`` | uint8 ``[B, F, 3, H, W]`` | RGB, 0 to 255 | ``ClipRenderTransform`` | scorers |
| ``events`` | bool ``[B, E]`` | happened anywhere in the clip | clip cutter | privileged scorer |
| ``score`` | float32 ``[B]`` | probability of Yes, 0 to 1; NaN: no score | scorers | ``write_scores`` |
| ``td_error`` | float32 ``[B]`` or ``[B, 1]`` | absolute, in units of return | recipe | ``update_priority`` |
| ``priority_weight`` | float32 ``[B]`` | (N q)^-β | sampler | loss |
| ``sampling_probability`` | float64 ``[B]`` | q, probability of the draw | sampler | whoever looks into a batch |
"""  # noqa: E501

from __future__ import annotations

RENDER_STATE = "render_state"
EVENTS = "events"
INDEX = "index"
GENERATION = "index_generation"
CLIP = "clip"
SCORE = "score"
TD_ERROR = "td_error"
WEIGHT = "priority_weight"
PROBABILITY = "sampling_probability"
