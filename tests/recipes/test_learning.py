"""Updates: TorchRL's losses are the oracle, and compiled or captured they are the same."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from lightning.fabric import Fabric
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.data import Categorical
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss, SACLoss, TD3Loss, ValueEstimators

from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.running import acceleration
from recipes.running.acceleration import COMPILING_PAYS, accelerated, way_of
from recipes.running.run_state import Learner
from recipes.sac import SAC
from recipes.settings import Training
from recipes.td3 import TD3
from tests.recipes.chain import ChainEnv, batch, learner
from vlmrb_torchrl.checks import ConfigError
from vlmrb_torchrl.objectives import IQNLoss

ALL = pytest.mark.parametrize("algorithm", [DQN, IQN, SAC, TD3])


def is_discrete(algorithm):
    return algorithm in (DQN, IQN)


def built(algorithm, **arguments):
    torch.manual_seed(0)
    return learner(algorithm, **arguments)


def updates(module, way="eager", made=None, number=6):
    """Run updates, ``made`` or not; returns what they leave: |δ|, figures and weights."""
    torch.manual_seed(1)
    left, made = [], {} if made is None else made
    for seed in range(number):
        name = module.next_update()
        if name not in made:
            made[name] = accelerated(getattr(module, name), way)
        td_error, figures = made[name](batch(is_discrete(type(module)), seed=seed))
        assert td_error.shape == (5,)
        assert not any(figure.requires_grad or figure.ndim for figure in figures.values())
        left += [td_error, *(figure.clone() for figure in figures.values())]
    return [*left, *(weight.detach().clone() for weight in module.parameters())]


# -------------------------------------------------------------- against TorchRL's losses


class Critic(nn.Module):
    """One critic as TorchRL's losses ask it."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, observation, action):
        return self.layers(torch.cat([observation, action], -1))


def put(params, *networks):
    """Give a loss's parameters the weights of a network, or of one for each critic."""
    weights = [TensorDict.from_module(network).data for network in networks]
    params.data.update_(weights[0] if params.batch_dims == 0 else torch.stack(weights))


def torchrl_loss(module):
    """TorchRL's own loss, of the same networks, targets and settings."""
    if isinstance(module, DQN | IQN):
        actor = QValueActor(module.network, spec=Categorical(2))
        if isinstance(module, IQN):
            loss = IQNLoss(actor, double_dqn=True)
        else:
            loss = DQNLoss(
                actor,
                action_space="categorical",
                loss_function="smooth_l1",
                double_dqn=True,
                delay_value=True,
            )
        put(loss.target_value_network_params["module", "0"], module.target)
    else:
        keys = {"in_keys": ["observation", "action"], "out_keys": ["state_action_value"]}
        value = TensorDictModule(Critic(copy.deepcopy(module.critics[0])), **keys)
        options = {"num_qvalue_nets": 2, "loss_function": "l2"}
        spec = ChainEnv(1, discrete=False).action_spec_unbatched
        if isinstance(module, SAC):
            loss = SACLoss(module.policy, value, alpha_init=0.3, action_spec=spec, **options)
        else:
            loss = TD3Loss(
                module.policy, value, action_spec=spec, policy_noise=0.2, noise_clip=0.5, **options
            )
            put(loss.target_actor_network_params, module.target_policy)
        critics = [Critic(layers) for layers in module.critics]
        put(loss.qvalue_network_params["module"], *critics)
        put(loss.target_qvalue_network_params["module"], *map(Critic, module.target))
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    return loss


def norm(params):
    gradients = [weight.grad for weight in params.parameters() if weight.grad is not None]
    return nn.utils.get_total_norm(gradients).item()


@ALL
def test_an_update_is_torchrl_s_losses_with_weights_and_several_steps(algorithm):
    """Losses, the gradients' norms and |δ|, from weights and targets that differ."""
    settings = {SAC: {"alpha_init": 0.3}}.get(algorithm, {})
    module = built(algorithm, gamma=0.9, learning_rate=0.0, **settings)
    targets = [module.target, *([module.target_policy] if algorithm is TD3 else [])]
    for target in targets:
        for weight in target.parameters():
            weight.data += 0.3 * torch.randn_like(weight)
    loss, drawn = torchrl_loss(module), batch(is_discrete(algorithm), size=16)
    torch.manual_seed(1)
    if is_discrete(algorithm):
        value = loss(theirs := drawn.clone())["loss"]
        value.backward()
        expected = {"loss/value": value, "gradient_norm/value": norm(loss.value_network_params)}
        td_error = theirs["td_error"].squeeze(-1)
        td_error = td_error.sqrt() if algorithm is DQN else td_error
    else:
        critic, actor = ("qvalue_v2_loss" if algorithm is SAC else "value_loss"), loss.actor_loss
        value, said = getattr(loss, critic)(drawn)
        value.backward()
        td_error = said["td_error"] if algorithm is SAC else said["td_error"].amax(0).sqrt()
        expected = {"loss/critic": value, "gradient_norm/critic": norm(loss.qvalue_network_params)}
        value, said = actor(drawn.exclude("priority_weight"))
        value.backward()
        expected |= {"loss/actor": value, "gradient_norm/actor": norm(loss.actor_network_params)}
        if algorithm is SAC:
            expected["loss/temperature"] = loss.alpha_loss(said["log_prob"]).mean()
    torch.manual_seed(1)
    ours, figures = module.update(drawn)
    torch.testing.assert_close(ours, td_error.detach(), rtol=1e-4, atol=1e-5)
    assert len(expected) == len([name for name in figures if name.startswith(("loss", "grad"))]) - (
        algorithm is SAC  # the temperature's gradient is its loss over log α
    )
    for name, number in expected.items():
        assert figures[name].item() == pytest.approx(float(number), rel=1e-4), name


@ALL
def test_weights_four_times_as_large_teach_the_same_bit_for_bit(algorithm):
    left = []
    for factor in (1, 4):
        module = built(algorithm)
        torch.manual_seed(1)
        drawn = batch(is_discrete(algorithm))
        drawn["priority_weight"] *= factor
        td_error, figures = module.update(drawn)
        left.append([td_error, *figures.values(), *module.parameters()])
    assert all(map(torch.equal, *left))


# -------------------------------------------------------------- what replay goes by


@ALL
def test_td_error_is_that_of_the_update_and_teaches_nothing(algorithm):
    module = shifted(algorithm, "td_error")
    drawn, before = batch(is_discrete(algorithm), size=8), copy.deepcopy(module.state_dict())
    torch.manual_seed(1)
    found = module.td_error(drawn)
    assert found.shape == (8,)
    assert not found.requires_grad
    assert all(map(torch.equal, module.state_dict().values(), before.values()))
    torch.manual_seed(1)
    signal, _ = getattr(module, module.next_update())(drawn)
    assert torch.equal(found, signal)
    assert signal.min() >= 0 < signal.max()


def shifted(algorithm, signal, **arguments):
    """An algorithm whose target networks differ from the online ones."""
    module = built(algorithm, **arguments)
    module.signal = signal
    for name, weight in module.named_parameters():
        weight.data += 0.3 * torch.randn_like(weight) * name.startswith("target")
    return module


def losses(module, drawn):
    """The loss of each transition: of a batch in which it alone has a weight."""
    left = []
    for weights in torch.eye(len(drawn)):
        torch.manual_seed(1)
        _, figures = module.update(drawn.clone().set("priority_weight", weights))
        left.append(next(figures[name] for name in figures if name.startswith("loss/")))
    return torch.stack(left)


@ALL
def test_reducible_loss_is_the_loss_less_that_of_the_target_network_on_the_same_target(algorithm):
    """At the end of episodes the target is the reward: an algorithm whose network is that target
    network has the loss that is taken off. Of two critics it is the mean, where losses add up.
    """
    module = shifted(algorithm, "reducible_loss", learning_rate=0.0)
    drawn = batch(is_discrete(algorithm), size=8)
    drawn["next", "terminated"].fill_(True)
    ahead = copy.deepcopy(module)
    online = ahead.network if is_discrete(algorithm) else ahead.critics
    online.load_state_dict(ahead.target.state_dict())
    ahead.prepare(Fabric(accelerator="cpu", devices=1))
    torch.manual_seed(1)
    signal, _ = module.update(drawn)
    difference = losses(module, drawn) - losses(ahead, drawn)
    difference /= 1 if is_discrete(algorithm) else 2
    assert (signal < 0).any()
    assert (signal > 0).any()
    torch.testing.assert_close(signal, difference, rtol=1e-4, atol=1e-5)


@ALL
def test_reducible_loss_is_exactly_zero_after_the_target_network_was_set_to_the_online_one(
    algorithm,
):
    module = built(algorithm)  # as it is made
    module.signal = "reducible_loss"
    signal, _ = module.update(batch(is_discrete(algorithm), size=64))
    assert not signal.any()
    signal, _ = module.update(batch(is_discrete(algorithm), size=64))
    assert signal.any()


@ALL
def test_what_is_learnt_does_not_depend_on_the_signal_that_is_asked_for(algorithm):
    left = []
    for signal in ("td_error", "reducible_loss"):
        module = shifted(algorithm, signal)
        torch.manual_seed(1)
        for seed in range(4):
            said, figures = module.update(batch(is_discrete(algorithm), seed=seed))
            assert said.shape == (5,)
            assert signal == "reducible_loss" or (said >= 0).all()
        left.append([*figures.values(), *module.parameters(), torch.rand(())])
    assert all(map(torch.equal, *left))


# -------------------------------------------------------------- compiled, captured


class NothingRead(TorchDispatchMode):
    """Refuses what waits for a device: a number read, a shape that hangs on one."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
        if any(name in operation.name() for name in waits):
            raise AssertionError(f"{operation} waits for the device")
        return operation(*args, **(kwargs or {}))


@ALL
def test_an_update_reads_no_number_back(algorithm):
    module = built(algorithm)
    updates(module, number=2)  # Adam's moments are made
    with NothingRead(), pytest.raises(AssertionError, match="waits"):
        torch.ones(()).item()
    for name in {module.next_update(), module.next_update()}:
        drawn = batch(is_discrete(algorithm))
        for module.signal in ("td_error", "reducible_loss"):
            with NothingRead():
                getattr(module, name)(drawn)


@ALL
@pytest.mark.parametrize(
    ("backend", "signal"),
    [
        ("eager", "td_error"),
        pytest.param("eager", "reducible_loss", marks=pytest.mark.slow),
        pytest.param("inductor", "td_error", marks=pytest.mark.slow),
        pytest.param("inductor", "reducible_loss", marks=pytest.mark.slow),
        ("cudagraph", "reducible_loss"),
    ],
)
def test_accelerated_updates_are_the_same_and_compiled_once(
    algorithm, backend, signal, monkeypatch
):
    """Without the C++ of the backend the graph is as it was captured; with it, it rounds otherwise.

    Without a GPU what would be a CUDA graph is run as it is.
    """
    if backend == "inductor" and not acceleration.compiler_is_here():
        pytest.skip("torch.compile wants a C++ compiler")
    expected, module = updates(shifted(algorithm, signal)), shifted(algorithm, signal)
    if backend == "cudagraph":
        with warnings.catch_warnings(action="ignore"):
            left = updates(module, "cudagraph")
    else:
        compiled = partial(torch.compile, backend=backend)
        monkeypatch.setattr(torch, "compile", compiled)
        torch.compiler.reset()
        left = updates(module, "compile", made := {})
        with torch.compiler.set_stance("fail_on_recompile"):
            updates(module, "compile", made)
    assert len(left) == len(expected)
    for one, other in zip(left, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def gradients(module, drawn):
    """What the optimizers of an update step by, and the figures."""
    kept, step = [], module.step
    module.step = lambda gradient: kept.append(gradient) or step(gradient)
    torch.manual_seed(1)
    _, figures = module.update(drawn)
    return kept, figures


@ALL
@pytest.mark.parametrize("share", [0.1, 10.0])
def test_gradients_are_cut_to_their_largest_norm_and_logged_as_they_were(algorithm, share):
    drawn = batch(is_discrete(algorithm))
    whole, said = gradients(built(algorithm, gradient_clip_norm=math.inf), drawn)
    most = share * whole[0].norm.item()
    cut, figures = gradients(built(algorithm, gradient_clip_norm=most), drawn)
    flat = nn.utils.parameters_to_vector(cut[0].parts)
    assert flat.norm().item() == pytest.approx(min(most, whole[0].norm.item()), rel=1e-3)
    name = f"gradient_norm/{cut[0].optimizer}"
    assert figures[name] == said[name] == whole[0].norm


@ALL
def test_in_bfloat16_losses_are_about_the_same_and_other_precisions_are_refused(algorithm):
    drawn, losses = batch(is_discrete(algorithm), size=64), []
    for precision in ("32-true", "bf16-mixed"):
        trained = Learner(
            Fabric(accelerator="cpu", devices=1, precision=precision), built(algorithm)
        )
        torch.manual_seed(1)
        _, figures = trained.update(drawn)
        losses.append(next(figures[name] for name in figures if name.startswith("loss/")).item())
    # An actor's draws are others where they are drawn in bfloat16.
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.3)
    with pytest.raises(ConfigError, match="--precision is bf16-true: use 32-true or bf16-mixed"):
        Learner(Fabric(accelerator="cpu", devices=1, precision="bf16-true"), built(algorithm))


class TwoRanks:
    """A rank beside one whose gradients are all 1 and whose weights are all 0."""

    world_size = 2

    def to_device(self, module):
        return module

    def broadcast(self, state):
        learnt = ("weight", "bias", "log_alpha")
        return {name: value * (not name.endswith(learnt)) for name, value in state.items()}

    def all_reduce(self, flat, reduce_op):
        assert reduce_op == "mean"
        return (flat + 1) / 2


@ALL
def test_ranks_start_with_equal_weights_and_step_by_their_mean_gradient(algorithm):
    """Each gradient of one's own, g, becomes (g + 1) / 2 before its norm is taken."""
    seen = []
    for ranks in (Fabric(accelerator="cpu", devices=1), TwoRanks()):
        module = built(algorithm, gradient_clip_norm=math.inf)
        module.prepare(ranks)
        assert all(not weight.any() for weight in module.parameters()) == (ranks.world_size == 2)
        for weight in module.parameters():
            weight.data.fill_(0.01)
        seen.append(gradients(module, batch(is_discrete(algorithm)))[0][0])
    own, mean = seen
    for part, both in zip(own.parts, mean.parts, strict=True):
        torch.testing.assert_close(both, (part + 1) / 2)
    flat = nn.utils.parameters_to_vector(mean.parts)
    assert mean.norm.item() == pytest.approx(flat.norm().item(), rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@ALL
def test_captured_updates_on_a_gpu_are_the_same(algorithm):
    """DQN draws nothing in an update; the others draw other numbers than an uncaptured one."""
    left = []
    for way in ("eager", "cudagraph"):
        torch.manual_seed(0)
        module = algorithm(ChainEnv(2, is_discrete(algorithm)), hidden_features=(8,))
        module.prepare(Fabric(accelerator="cuda", devices=1))
        step = {}
        for seed in range(40):
            name = module.next_update()
            step.setdefault(name, accelerated(getattr(module, name), way))
            _, figures = step[name](batch(is_discrete(algorithm), size=64, seed=seed).cuda())
        left.append(figures["value/td_error"].item())
    assert left[1] == pytest.approx(left[0], rel=1e-4 if algorithm is DQN else 0.5)


class Launched:
    """What Fabric says of a run that it launched."""

    def __init__(self, device="cpu", ranks=1):
        self.device, self.world_size = torch.device(device), ranks


@pytest.mark.parametrize(
    ("device", "ranks", "judge_in_thread", "updates_in_all", "way"),
    [
        ("cpu", 1, False, COMPILING_PAYS, "compile"),
        ("cpu", 1, False, COMPILING_PAYS - 1, "eager"),
        ("cpu", 2, False, 2 * COMPILING_PAYS, "compile"),
        ("cpu", 2, False, COMPILING_PAYS, "eager"),
        ("cuda", 1, False, 100, "cudagraph"),
        ("cuda", 1, True, 100, "eager"),
        ("cuda", 2, False, 100, "eager"),
    ],
)
def test_auto_compiles_long_runs_on_a_cpu_and_captures_on_one_gpu(
    device, ranks, judge_in_thread, updates_in_all, way, monkeypatch
):
    monkeypatch.setenv("CXX", "sh")  # some program
    training = Training(
        total_env_steps=1000 + updates_in_all, warmup_env_steps=1000, updates_per_env_step=1
    )
    launched = Launched(device, ranks)
    assert way_of(training, launched, judge_in_thread=judge_in_thread) == way
    monkeypatch.setenv("CXX", "no-such-compiler")
    without = "eager" if way == "compile" else way
    assert way_of(training, launched, judge_in_thread=judge_in_thread) == without


@pytest.mark.parametrize(
    ("way", "remedy"), [("compile", "or name another"), ("cudagraph", "a GPU .*compile or auto")]
)
def test_what_is_not_possible_here_is_refused_in_one_line(way, remedy, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=f"training.accelerate is {way}: .*{remedy}") as refusal:
        way_of(Training(accelerate=way), Launched(), judge_in_thread=False)
    assert "\n" not in str(refusal.value)
