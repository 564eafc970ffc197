"""The gradients are summed in fixed buckets, which start during the backward pass and hold complete gradients."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_workers import Together
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchloom.errors import UserError
from patchloom.models.denoiser import Denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.gradients import BUCKETS, Gradients, bucket_starts
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.step import StoredRows, TrainingState, new_state, training_step
from patchloom.models.step_plan import StepSettings, plan_step

LAYERS = 5


def chain() -> nn.Sequential:
    """Layers of 6 numbers, the first of which gets its gradient last."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(LAYERS)))


def ignored(_: Tensor) -> None:
    """The sum of one worker."""


@pytest.mark.parametrize(
    ("numels", "least_bytes", "starts"),
    [
        ([4, 4, 4], 4, [8, 4, 0]),
        ([4, 4, 4], 20, [4, 0]),  # at least 5 numbers, but for the first layers
        ([1, 1, 100], 4, [2, 0]),
        ([100, 1, 1], 4, [0]),
        ([7], 4, [0]),
        ([2] * 64, 4, [120, 112, 104, 96, 88, 80, 72, 64, 56, 48, 40, 32, 24, 16, 8, 0]),
    ],
)
def test_buckets_go_from_the_last_layer_to_the_first(numels: list[int], least_bytes: int, starts: list[int]) -> None:
    assert bucket_starts(numels, least_bytes) == starts


def test_the_number_of_buckets_is_limited_and_they_cover_all_numbers() -> None:
    for seed in range(50):
        numels = torch.randint(1, 1000, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        starts = bucket_starts(numels, 4)
        assert len(starts) <= BUCKETS and starts[-1] == 0 and starts == sorted(set(starts), reverse=True)


def test_the_sum_of_the_last_layers_starts_before_the_first_layer_has_its_gradient() -> None:
    network, events = chain(), list[str]()
    gradients = Gradients(network, (1,), least_bucket_bytes=24)
    for number, layer in enumerate(network):
        layer.weight.register_post_accumulate_grad_hook(lambda _, n=number: events.append(f"gradient {n}"))
    names = {bucket.data_ptr(): f"sum {number}" for number, bucket in enumerate(gradients.buckets)}
    for _ in range(3):  # every step alike
        events.clear()
        with gradients.summed(lambda bucket: events.append(names[bucket.data_ptr()])):
            network(torch.ones(3, 2)).sum().backward()
        assert [event for event in events if "sum" in event] == [f"sum {number}" for number in range(LAYERS)]
        assert events.index("sum 0") < events.index("gradient 3")
        assert events.index("sum 3") < events.index("gradient 0")


def test_the_backward_pass_goes_on_while_a_sum_is_slow() -> None:
    """The first sum ends once the first layer has its gradient: a backward pass that waited for it would not end."""
    network, at_first_layer = chain(), threading.Event()
    gradients = Gradients(network, (1,), least_bucket_bytes=24)
    network[0].weight.register_post_accumulate_grad_hook(lambda _: at_first_layer.set())
    ended = []
    with gradients.summed(lambda _: lambda: ended.append(at_first_layer.wait(20))):
        network(torch.ones(3, 2)).sum().backward()
        assert not ended
    assert ended == [True] * LAYERS


def test_buckets_are_complete_when_their_sums_start() -> None:
    network, sent = chain(), list[Tensor]()
    gradients = Gradients(network, (2,), least_bucket_bytes=24)
    gradients.loss_and_crops[1] = torch.tensor([3.0, 4.0])
    with gradients.summed(lambda bucket: sent.append(bucket.clone())):
        network(torch.ones(3, 2)).sum().backward()
    assert torch.equal(torch.cat(sent[::-1]), gradients.flat)
    plain = chain()
    plain(torch.ones(3, 2)).sum().backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in plain.parameters() if parameter.grad is not None])
    assert torch.equal(gradients.flat[: gradients.length], wanted)
    assert gradients.flat[gradients.length :].tolist() == [0, 0, 3, 4]


def test_layers_without_a_gradient_are_summed_too() -> None:
    network, sent = chain(), list[int]()
    network[2].requires_grad_(False)
    gradients = Gradients(network, (1,), least_bucket_bytes=24)
    assert len(gradients.buckets) == LAYERS - 1
    for used in (slice(3, LAYERS), slice(0, 2), slice(0, 0)):  # only the last layers, only the first ones, none
        sent.clear()
        with gradients.summed(lambda bucket: sent.append(bucket.data_ptr())):
            if network[used]:
                network[used](torch.ones(3, 2)).sum().backward()
        assert sent == [bucket.data_ptr() for bucket in gradients.buckets]


def test_backward_passes_outside_of_the_block_sum_nothing() -> None:
    network, sent = chain(), list[Tensor]()
    gradients = Gradients(network, (1,), least_bucket_bytes=24)
    for _ in range(2):
        network(torch.ones(3, 2)).sum().backward()
        assert len(sent) % LAYERS == 0
        with gradients.summed(sent.append):
            network(torch.ones(3, 2)).sum().backward()
    assert len(sent) == 2 * LAYERS


def test_one_worker_has_no_hooks() -> None:
    network = chain()
    gradients = Gradients(network, (1,))
    with gradients.summed(None):
        network(torch.ones(3, 2)).sum().backward()
    assert all(not parameter._post_accumulate_grad_hooks for parameter in network.parameters())


def test_an_error_in_the_backward_pass_starts_no_further_sums() -> None:
    network, sent = chain(), list[Tensor]()
    gradients = Gradients(network, (1,), least_bucket_bytes=24)
    with pytest.raises(ZeroDivisionError), gradients.summed(sent.append):
        raise ZeroDivisionError
    network(torch.ones(3, 2)).sum().backward()
    assert sent == []


class SharedLayer(nn.Module):
    """A layer that is called twice, in separate backward passes if it is `reentrant`."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.shared, self.reentrant = nn.Linear(2, 2), nn.Linear(2, 2), reentrant

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.shared, x, use_reentrant=self.reentrant)
        return x


def test_a_gradient_that_comes_after_its_bucket_is_an_error_and_never_a_wrong_sum() -> None:
    for reentrant in (False, True):
        network = SharedLayer(reentrant)
        gradients = Gradients(network, (1,), least_bucket_bytes=8)
        sent = list[Tensor]()
        if reentrant:
            with pytest.raises(UserError, match=r"shared\.\w+ .*use_reentrant=False"), gradients.summed(ignored):
                network(torch.ones(3, 2)).sum().backward()
        else:
            with gradients.summed(lambda bucket, s=sent: s.append(bucket.clone())):
                network(torch.ones(3, 2)).sum().backward()
            assert torch.equal(torch.cat(sent[::-1]), gradients.flat)


def new_run(denoiser: Denoiser, settings: StepSettings, least_bucket_bytes: int) -> TrainingState:
    state = new_state(denoiser, [HalfLifeEMA(denoiser, 100)], settings, (0.9, 0.999), 1e-8)
    state.gradients = Gradients(denoiser, (len(settings.schedule.sizes), 5), least_bucket_bytes)
    return state


def settings_of(draw: str) -> StepSettings:
    return StepSettings(
        seed=3, schedule=patch_schedule(16, 0.5), updates=8, batch_size=8, block_size=2, lr=1e-3,
        lr_rampup_images=0, draw=draw, emulated_ranks=2,
    )  # fmt: skip


def train_two(
    make: Callable[[], Denoiser], draw: str, least_bucket_bytes: int, microbatch: int | None = None, steps: int = 8
) -> tuple[list[TrainingState], list[int]]:
    """Two workers that take some steps, and the sizes of the parts that worker 0 summed."""
    settings, sizes = settings_of(draw), list[int]()
    states = [new_run(make(), settings, least_bucket_bytes) for _ in range(2)]

    def work(rank: int, reduce: Callable[[Tensor], None]) -> None:
        def start_sum(bucket: Tensor) -> None:
            sizes.extend([len(bucket)] * (rank == 0))
            reduce(bucket)

        state = states[rank]
        for step in range(steps):
            plan = plan_step(settings, step, state.images_seen)
            work = [
                (group, StoredRows(pixels(group.crops), torch.full((len(group.crops),), -1)))
                for group in plan.share(rank, 2, microbatch)
            ]
            training_step(state, settings, plan, work, pixel_normalisation(), start_sum)
            assert state.gradients.loss_and_crops[..., 1].sum() == plan.crops

    Together(2).run(work)
    return states, sizes


def pixels(crops: range) -> Tensor:
    generator = torch.Generator().manual_seed(crops.start)
    return torch.randint(0, 256, (len(crops), 3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("draw", ["shared", "stratified", "independent"])
@pytest.mark.parametrize("microbatch", [None, 2])
def test_weights_of_two_workers_do_not_depend_on_the_buckets(
    draw: str, microbatch: int | None, tiny_denoiser: Callable[..., Denoiser]
) -> None:
    (one, other), sizes = train_two(tiny_denoiser, draw, 1000, microbatch)
    (whole, _), whole_sizes = train_two(tiny_denoiser, draw, 10**9, microbatch)
    buckets = len(one.gradients.buckets)
    assert 8 < buckets <= BUCKETS and len(sizes) == 8 * buckets  # once per step, not per microbatch
    assert whole_sizes == [len(whole.gradients.flat)] * 8  # one sum of everything, as there was before buckets
    for a, b, c in zip(*(state.denoiser.parameters() for state in (one, other, whole)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.equal(one.gradients.flat, whole.gradients.flat)


def test_a_compiled_network_sums_complete_buckets() -> None:
    network, sent = chain(), list[Tensor]()
    gradients = Gradients(network, (1,), least_bucket_bytes=24)
    network.compile(dynamic=False, backend="aot_eager")
    for _ in range(2):  # the hooks are new in the first one
        gradients.flat.zero_()
        with gradients.summed(lambda bucket: sent.append(bucket.clone())):
            network(torch.ones(3, 2)).sum().backward()
    assert len(sent) == 2 * LAYERS
    assert torch.equal(torch.cat(sent[: LAYERS - 1 : -1]), gradients.flat)
    assert gradients.flat[: gradients.length].all()
