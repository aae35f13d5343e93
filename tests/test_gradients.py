"""One buffer, in segments that are handed on while the backward goes on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from eqm.config import NetworkConfig, ObjectiveConfig, TrainConfig
from eqm.gradients import FlatGradient, cut, update_under_way
from eqm.learner import Learner
from eqm.network import Transformer

COUNTS = st.lists(st.integers(1, 50), min_size=1, max_size=30)
CPU = torch.device("cpu")


@given(COUNTS, st.integers(1, 200))
def test_every_weight_is_in_one_segment_of_its_size(counts: list[int], least: int) -> None:
    found = cut(counts, least)
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0
    ends = [len(counts), *found]
    sizes = [sum(counts[a:b]) for a, b in zip(found, ends, strict=False)]
    assert sum(sizes) == sum(counts)
    assert all(size >= least for size in sizes[:-1])


@given(COUNTS, st.integers(1, 200), st.integers(1, 70))
def test_segments_are_the_buffer(counts: list[int], least: int, room: int) -> None:
    weights = [nn.Parameter(torch.zeros(count)) for count in counts]
    found = FlatGradient(weights, room=room, segment_bytes=4 * least)
    for segment in found.segments:
        segment += 1
    assert bool((found.buffer == 1).all())
    assert found.beside.shape == (room,)
    assert found.flat.shape == (sum(counts),)
    last = found.segments[-1]
    assert found.beside.data_ptr() == last.data_ptr()
    assert all(int(w.grad.sum()) == w.numel() for w in weights if w.grad is not None)


def learner(**changes: object) -> Learner:
    network = Transformer(
        NetworkConfig(width=16, depth=4, heads=2, patch=2), size=8, channels=1, classes=3
    )
    network.initialise(0, zero_head=False)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.05
    objective = ObjectiveConfig(**changes)  # type: ignore[arg-type]
    config = TrainConfig(images=64, batch_size=8)
    found = Learner(network, objective, config, device=CPU, micro_batch=4)
    found.gradients = FlatGradient(tuple(found.trained.values()), room=2, segment_bytes=4096)
    return found


def test_a_backward_that_is_replayed_gives_what_others_give() -> None:
    """But for the recording, which is a GPU's."""
    numbers, found = torch.arange(8), []
    for replays in (True, False):
        of, taken = learner(), []
        if replays:
            of._recorded = of._all_parts  # type: ignore[assignment]
        x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        at = of.corrupted(x, numbers % 3, numbers)
        losses = of.backward(at, lambda segment, into=taken: into.append(segment.clone()))
        found.append([losses, of.gradient().clone(), *taken])
    assert len(found[0]) == len(found[1]) > 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weights_are_cast_once_an_update_and_products_add_in_none_but_it() -> None:
    of = learner()
    weight, other = of.gradients.weights[0], torch.ones(3)
    assert update_under_way() is None
    with of.gradients.adding():
        update = update_under_way()
        assert update is not None
        assert update.sum_of(weight) is weight.grad
        assert update.sum_of(other) is None
        half = update.cast(weight, torch.bfloat16)
        assert update.cast(weight, torch.bfloat16) is half
        assert update.cast(other, torch.bfloat16) is not update.cast(other, torch.bfloat16)
    assert update_under_way() is None
    with torch.no_grad():
        weight += 1
    with of.gradients.adding():
        anew = update_under_way()
        assert anew is not None
        assert torch.equal(anew.cast(weight, torch.bfloat16), weight.to(torch.bfloat16))
        assert not torch.equal(half, weight.to(torch.bfloat16))


def gradient_of(of: Learner, *, handed: bool) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """The gradient, and what was handed, when: layers that the backward had yet to reach."""
    numbers = torch.arange(8)
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, Tensor]] = []
    left = [0]

    def entered(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        left[0] += 1
        given[0].register_hook(lambda _: left.__setitem__(0, left[0] - 1))

    hooks = [b.register_forward_pre_hook(entered) for b in of.network.blocks]  # type: ignore[union-attr]
    at = of.corrupted(x, numbers % 3, numbers)
    of.backward(at, (lambda part: seen.append((left[0], part.clone()))) if handed else None)
    for hook in hooks:
        hook.remove()
    return of.gradient().clone(), seen


@pytest.mark.parametrize("energy", ["implicit", "dot"])
@pytest.mark.parametrize("backward", ["double", "directional"])
def test_what_is_handed_is_complete_and_early(energy: str, backward: str) -> None:
    of = learner(energy=energy, backward=backward)
    usual, nothing = gradient_of(learner(energy=energy, backward=backward), handed=False)
    found, seen = gradient_of(of, handed=True)
    assert not nothing
    assert torch.equal(found, usual)
    assert len(seen) == len(of.gradients.segments) - 1 > 3
    for (_, part), segment in zip(seen, of.gradients.segments, strict=False):
        assert torch.equal(part, segment)
    if energy == "implicit":
        # Of the last block while it has yet to tell the one before, and so on.
        assert sorted({left for left, _ in seen}, reverse=True)[:3] == [4, 3, 2]


def test_a_weight_that_the_loss_does_not_reach_holds_nobody_up_for_ever() -> None:
    weights = [nn.Parameter(torch.ones(4)) for _ in range(4)]
    found = FlatGradient(weights, room=1, segment_bytes=16)
    seen: list[Tensor] = []
    with found.handing(seen.append):
        (weights[0] * weights[2]).sum().backward()
        # The last weight's segment comes first, and is not known to be complete.
        assert not seen
    assert [part.tolist() for part in seen] == [[0] * 4, [1] * 4, [0] * 4]
    assert found.segments[-1][-4:].tolist() == [1] * 4


def test_gradients_that_others_put_in_the_place_are_handed_as_well() -> None:
    weights = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    found = FlatGradient(weights, room=1, segment_bytes=16)
    for weight in weights:
        weight.grad = None
    seen: list[Tensor] = []
    with found.handing(seen.append):
        (weights[0] * 3 + weights[1] * 2).sum().backward()
        assert [part.tolist() for part in seen] == [[2] * 4]
    assert found.flat.tolist() == [3] * 4 + [2] * 4


def test_outside_nothing_is_handed_and_a_failure_hands_nothing_more() -> None:
    weights = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    found = FlatGradient(weights, room=1, segment_bytes=16)
    seen: list[Tensor] = []

    def fail() -> None:
        with found.handing(seen.append):
            weights[2].sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(seen) == 1
    sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
    assert len(seen) == 1
