"""What a GPU must not be asked: nothing of a cycle waits for it, and few kernels make it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tests.samplers.sampler_facts import EVERY, SEED, SLOTS, Slots, facts, snapshot, told
from vlmrb_torchrl.samplers import GuidedPERSampler, VLMPrioritizedSampler

GPU = torch.device("cuda:0")
# Where no data is touched, or only the host's.
NO_KERNELS = {"alias", "as_strided", "detach", "device", "empty", "empty_like", "expand"} | {
    "new_empty", "select", "slice", "squeeze", "unbind", "unsqueeze", "view"
}  # fmt: skip


# Of these a GPU's kernel takes a number, read from the tensor; tensors without data do not say so.
READ = {"index_fill_.int_Tensor", "masked_fill.Tensor", "masked_fill_.Tensor"}


class Kernels(TorchDispatchMode):
    """Counts operations that start at least one kernel, and refuses those that read a value."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__.partition(".")[0]
        assert func.__name__ not in READ
        self.names.update({name} - NO_KERNELS)
        return func(*args, **(kwargs or {}))


class OnGpu(Slots):
    """A storage on a GPU that is not there."""

    device = GPU


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on a GPU without data: what would read a value of one raises."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda values: values)  # which needs a real one
    with FakeTensorMode():
        yield


def working(kind: type = VLMPrioritizedSampler, **arguments: Any) -> VLMPrioritizedSampler:
    sampler: VLMPrioritizedSampler = kind(SLOTS, device="cuda", **arguments)
    sampler.mark_update(torch.arange(SLOTS, device=GPU), storage=OnGpu(SLOTS))
    return sampler


@pytest.mark.usefixtures("fake_gpu")
def test_a_value_on_the_fake_gpu_cannot_be_read() -> None:
    with pytest.raises(Exception, match="_local_scalar_dense"):
        bool(torch.ones((), device=GPU) > 0)


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize(
    ("td_boost", "within", "source"), [(True, False, GPU), (False, True, torch.device("cpu"))]
)
@pytest.mark.parametrize("kind", [VLMPrioritizedSampler, GuidedPERSampler])
def test_nothing_is_waited_for(
    td_boost: bool, within: bool, source: torch.device, kind: type
) -> None:
    sampler = working(kind, td_boost=td_boost, max_priority_within_buffer=within, beta=0.4)
    sampler._rng = torch.Generator() if source.type == "cpu" else None
    for rows in (SLOTS // 2, SLOTS):  # a buffer that fills up, then a full one
        storage, index = OnGpu(rows), torch.arange(8, device=source)
        steps: list[Callable[[], Any]] = [
            lambda storage=storage: sampler.sample(storage, 16),
            lambda index=index, storage=storage: sampler.mark_update(index, storage=storage),
            lambda index=index: sampler.extend(index),
            lambda storage=storage: sampler.match_storage(storage),
        ]
        for told_of in (None, storage):
            for tell in (sampler.update_priority, sampler.update_score):
                for value in (0.5, torch.rand(8, device=source), torch.rand(8, 1, device=source)):
                    steps.append(
                        lambda tell=tell, index=index, value=value, told_of=told_of: tell(
                            index, value, storage=told_of
                        )
                    )
        with Kernels():
            for step in (*steps, *steps[::-1]):
                step()
        for name, setting in (("lmbda", 0.25), ("beta", 0.5), ("alpha", 0.7)):
            setattr(sampler, name, setting)
        index, info = sampler.sample(storage, 16)
        assert {each.device for each in (index, *info.values())} == {GPU}


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), GPU])
def test_a_sampler_does_not_move_to_where_it_is(device: Any) -> None:
    """Each move reads every value, and there is one before each call."""
    sampler, storage = working(), OnGpu(SLOTS)
    sampler._device, storage.device = None, device  # it once followed the storage
    sampler.match_storage(storage)
    sampler.update_priority(torch.arange(8), torch.rand(8), storage=storage)


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize(("td_boost", "most"), [(False, 52), (True, 70)])
def test_a_cycle_is_few_kernels(td_boost: bool, most: int) -> None:
    """Each costs 2 μs and more; three levels, a sort and boolean indices took about 100."""
    sampler, storage = working(td_boost=td_boost, beta=0.4), OnGpu(SLOTS)
    td_error = torch.rand(16, device=GPU)
    sampler.sample(storage, 16)
    with Kernels() as kernels:
        index, _ = sampler.sample(storage, 16)
        sampler.update_priority(index, td_error, storage=storage)
    print(kernels.names.total(), kernels.names)
    assert kernels.names.total() <= most


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_bad_value_is_left_out_and_raises_when_the_sampler_is_read() -> None:
    calls = [
        *(("update_priority", [3], [bad]) for bad in (math.nan, math.inf, -0.5, 1e308)),
        *(("update_score", [3], [bad]) for bad in (math.nan, math.inf, -0.5, 1.0001)),
        *(
            (tell, [index], [0.5])
            for tell in ("update_priority", "update_score", "mark_update")
            for index in (-2, SLOTS, 2**40)
        ),
    ]
    sampler = told(VLMPrioritizedSampler(SLOTS, td_boost=True, threshold=None), *facts(SEED))
    before = snapshot(sampler)
    for method, index, value in calls:
        for read in (
            sampler.state_dict,
            sampler.check_valid,
            lambda: sampler.statistics(SLOTS),
            lambda: sampler.probabilities(SLOTS),
        ):
            arguments = [torch.tensor(index), torch.tensor(value, dtype=torch.float64)]
            getattr(sampler, method)(*arguments[: 1 if method == "mark_update" else 2])
            with pytest.raises(ValueError, match="left out") as refusal:
                read()
            assert "\n" not in str(refusal.value)
            assert snapshot(sampler) == before, (method, index, value)  # told of once
    sampler.check_valid()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_good_values_of_a_call_are_written_beside_bad_ones() -> None:
    sampler = VLMPrioritizedSampler(4, td_boost=True, unscored_priority=1.0, alpha=1.0, eps=0.0)
    sampler.extend(torch.arange(4))
    sampler.update_priority(torch.tensor([0, 1, -1, 9, 2]), torch.tensor([3, math.nan, 1, 1, 2]))
    assert sampler._sum_tree.leaves().tolist() == [3.0, 1.0, 2.0, 1.0]
    assert float(sampler.default_priority) == 3.0


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_slot_behind_the_rows_of_the_storage_cannot_be_told_of() -> None:
    sampler, storage = VLMPrioritizedSampler(SLOTS, td_boost=True), Slots(9)
    sampler.update_score(EVERY[:12], torch.ones(12), storage=storage)
    index, _ = sampler.sample(storage, 500)
    assert int(index.max()) == 8
    with pytest.raises(ValueError, match="left out"):
        sampler.check_valid()


@pytest.mark.usefixtures("place")
def test_of_duplicates_the_last_td_error_counts() -> None:
    sampler = VLMPrioritizedSampler(9, td_boost=True, unscored_priority=1.0, alpha=1.0, eps=0.0)
    sampler.extend(torch.arange(9))
    sampler.update_priority(torch.tensor([3, 5, 3, 3, 5]), torch.tensor([7.0, 8.0, 9.0, 2.0, 4.0]))
    assert sampler._sum_tree.leaves().tolist() == [1, 1, 1, 2, 1, 4, 1, 1, 1]
    assert sampler.default_priority == 9.0
    sampler.check_valid()


def cycle(sampler: VLMPrioritizedSampler, draw: Tensor, td_error: Tensor) -> Any:
    drawn = sampler._draw(draw)
    sampler.update_priority(drawn[0], td_error)
    return drawn


def recorded(sampler: VLMPrioritizedSampler, draw: Tensor, td_error: Tensor) -> Any:
    """What a CUDA graph does: the kernels of one call, on the same memory, whatever Python says."""
    twin = copy.deepcopy(sampler)  # recording runs it as well
    graph = make_fx(lambda *numbers: cycle(twin, *numbers))(draw, td_error)
    sampler.__dict__.update(twin.__dict__)
    return graph


def compiled(sampler: VLMPrioritizedSampler, draw: Tensor, td_error: Tensor) -> Any:
    torch._dynamo.reset()
    whole = torch.compile(cycle, fullgraph=True, backend="aot_eager")
    return lambda *numbers: whole(sampler, *numbers)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("td_boost", [False, True])
@pytest.mark.parametrize("hold", [recorded, pytest.param(compiled, marks=pytest.mark.slow)])
def test_a_graph_of_a_cycle_hears_of_new_rows_scores_and_settings(
    td_boost: bool, hold: Callable[..., Any]
) -> None:
    """Nothing in it is fixed but the shapes."""
    same: dict[str, Any] = {"lmbda": 0.3, "td_boost": td_boost, "beta": 0.4, "eps": 1e-3}
    eager, held = (told(VLMPrioritizedSampler(SLOTS, **same), *facts(SEED)) for _ in range(2))
    eager.match_storage(Slots(SLOTS))
    held.match_storage(Slots(SLOTS))
    draw, td_error = torch.rand(2, 16, dtype=torch.float64)
    graph = hold(held, draw, td_error)
    if hold is recorded:
        cycle(eager, draw, td_error)
    rng = torch.Generator().manual_seed(SEED)
    for step in range(1, 5):
        draw, td_error = torch.rand(2, 16, dtype=torch.float64, generator=rng)
        for sampler in (eager, held):
            sampler.lmbda, sampler.beta = 0.2 * step, 0.1 * step
            sampler.mark_update(EVERY[step : step + 4])
            sampler.update_score(EVERY[step : step + 2], 1.0)
            sampler.match_storage(Slots(SLOTS - step))  # emptied by another buffer
        torch.testing.assert_close(cycle(eager, draw, td_error), graph(draw, td_error))
    assert snapshot(eager) == snapshot(held)
    held.check_valid()
