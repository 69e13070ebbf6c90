"""Evaluation of a policy on seeds that training never sees."""

from __future__ import annotations

from contextlib import closing

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Categorical
from torchrl.envs.utils import ExplorationType, set_exploration_type

from recipes.settings import Training
from recipes.tasks import Task


@torch.no_grad()
def evaluate(
    policy: TensorDictModuleBase, task: Task, training: Training, number: int
) -> dict[str, float]:
    """Play one episode in each of ``training.eval_episodes`` held-out environments.

    The environments depend on ``number`` alone: two methods, and two seeds, are judged on the
    same ones.

    Args:
        policy: Greedy policy; a share ``training.eval_epsilon`` of its actions is replaced by
            random ones if they are discrete.
        task: Factory of the environments.
        training: Episodes and ε.
        number: Which evaluation of the run this is, from 0.

    Returns:
        ``success`` (share of episodes, if the task knows it), ``return`` (mean, undiscounted) and
        ``length`` (mean, environment steps).
    """
    episodes, threads = training.eval_episodes, torch.get_num_threads()
    device = next(policy.parameters()).device
    noise = torch.Generator().manual_seed(number)
    alive = torch.ones(episodes, dtype=torch.bool)
    success = torch.zeros(episodes, dtype=torch.bool)
    total, length = torch.zeros(episodes), torch.zeros(episodes)
    with (
        closing(task.make(episodes, seed=number, held_out=True)) as env,
        set_exploration_type(ExplorationType.DETERMINISTIC),
    ):
        spec, state = env.action_spec, env.reset()
        while alive.any():
            # Entry by entry: a TensorDict's own move asks the driver for its GPUs each time.
            seen = {key: state.get(key).to(device) for key in policy.in_keys}
            action = policy(TensorDict(seen, state.batch_size)).get("action").cpu()
            if isinstance(spec, Categorical):
                random = torch.rand(episodes, generator=noise) < training.eval_epsilon
                anything = torch.randint(spec.space.n, (episodes,), generator=noise)
                action = torch.where(random, anything, action)
            # Finished games wait, where the environment can leave some alone.
            state = state.set("action", action).set("_step", alive.clone())
            played, state = env.step_and_maybe_reset(state)
            outcome = played["next"]
            succeeded = task.success(outcome)
            if succeeded is not None:
                success |= alive & succeeded
            total += outcome["reward"].squeeze(-1) * alive
            length += alive
            alive &= ~outcome["done"].squeeze(-1)
    torch.set_num_threads(threads)  # TorchRL's batched environments raise it when they close
    result = {} if succeeded is None else {"success": success.float().mean().item()}
    return result | {"return": total.mean().item(), "length": length.mean().item()}
