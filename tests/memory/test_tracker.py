"""The tracker of live bytes: exact on known sequences, alike on fake and real tensors, true to the allocator."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from trimodal.memory import tracker as tracker_module
from trimodal.memory.tracker import HOST, TAGS, OverLimit, PeakMemory, phase, tracing

KIB = 1024


class Tower(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0, batch_first=True)
                                    for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def train(tower: Tower, x: Tensor, micro_batch: int, steps: int = 2) -> None:
    """Steps as training runs them: parts under recompute, one loss over all, fused AdamW."""
    optimizer = torch.optim.AdamW(tower.parameters(), fused=True)
    for _ in range(steps):
        features = tower(x) if micro_batch >= len(x) else torch.cat(
            [checkpoint(tower, part, use_reentrant=False, preserve_rng_state=False) for part in x.split(micro_batch)])
        features = tracker_module.loss_ends_at(features)
        with tracker_module.phase("loss"):
            (features @ features.T).logsumexp(1).mean().backward()
        with tracker_module.phase("optimizer"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def measure(mode: PeakMemory, micro_batch: int, batch: int = 16, tokens: int = 20) -> tracker_module.Usage:
    with mode:
        tower = Tower()
        mode.watch(tower.parameters())
        x = torch.ones(batch, tokens, 32)
        mode.mark("data", x)
        train(tower, x, micro_batch)
    return mode.usage()


def test_storages_count_once_from_birth_to_death() -> None:
    with PeakMemory() as tracker:
        a = torch.empty(KIB, dtype=torch.uint8)
        view = a[10:].view(2, -1)
        assert tracker.live_bytes == KIB
        b = a.repeat(3)
        del a
        assert tracker.live_bytes == 4 * KIB, "the view still holds the storage"
        del view
        assert tracker.live_bytes == 3 * KIB
        c = torch.empty(1, dtype=torch.uint8)
        assert tracker.live_bytes == 3 * KIB + 512, "whole blocks"
        del b, c
        assert tracker.live_bytes == 0
    assert tracker.usage().peak_bytes == 4 * KIB


def test_tensors_from_before_and_resized_ones_are_seen() -> None:
    old = torch.ones(2 * KIB, dtype=torch.uint8)
    with PeakMemory() as tracker:
        new = old + 1
        assert tracker.live_bytes == 4 * KIB
        new.resize_(3 * KIB)
        assert tracker.live_bytes == 5 * KIB
        del old
        assert tracker.live_bytes == 3 * KIB


def test_nothing_is_followed_after_the_end() -> None:
    with PeakMemory() as tracker:
        weight = nn.Parameter(torch.ones(4))
        tracker.watch([weight])
    live = tracker.live_bytes
    weight.sum().backward()
    assert tracker.live_bytes == live and tracker.live_by_tag["gradients"] == 0
    del weight
    assert tracker.live_bytes == live


def test_the_peak_is_told_by_tag() -> None:
    """Widths chosen so that each tag's bytes are known: at the peak, the update, nothing but these is alive."""
    with PeakMemory() as tracker:
        layer = nn.Linear(64, 256, bias=False)
        tracker.watch(layer.parameters())
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        x = torch.ones(1, 64)
        tracker.mark("data", [{"x": (x, None)}])
        layer(x).sum().backward()
        with tracker_module.phase("optimizer"):
            optimizer.step()
    usage = tracker.usage()
    weight = 64 * 256 * 4
    assert usage.by_tag == {"parameters": weight, "gradients": weight, "optimizer": 2 * weight + 512,
                            "activations": 0, "loss": 0, "data": 512}
    assert usage.peak_bytes == sum(usage.by_tag.values())


def test_the_backward_of_the_loss_is_loss_and_that_of_the_tower_is_not() -> None:
    with PeakMemory() as tracker:
        x = torch.ones(256, 8, requires_grad=True)
        features = tracker_module.loss_ends_at(x * 2)
        with tracker_module.phase("loss"):
            (features @ features.T).square().sum().backward()
            assert tracker.tag == "activations"
        assert tracker.tag == "activations"
    usage = tracker.usage()
    scores = 256 * 256 * 4
    assert 2 * scores <= usage.by_tag["loss"] < 4 * scores + 5 * KIB
    assert usage.by_tag["activations"] <= 3 * x.nbytes


@pytest.mark.parametrize("micro_batch", [16, 6])
def test_fake_and_real_steps_peak_alike(micro_batch: int) -> None:
    with FakeTensorMode():
        fake = measure(PeakMemory(), micro_batch)
    assert fake == measure(PeakMemory(), micro_batch)
    assert sum(fake.by_tag.values()) == fake.peak_bytes and set(fake.by_tag) == set(TAGS)


@pytest.mark.parametrize("micro_batch", [16, 8])
def test_the_peak_agrees_with_the_record_of_the_allocator(micro_batch: int) -> None:
    """The profiler writes down every allocation of the CPU allocator, those within operations too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train(Tower(), torch.ones(16, 20, 32), micro_batch)
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert measure(PeakMemory(granularity=64), micro_batch).peak_bytes == pytest.approx(peak, rel=0.02)


def test_recompute_by_parts_lowers_the_peak_and_repeated_steps_do_not_grow() -> None:
    with tracing() as tracker:
        tower = Tower()
        x = torch.ones(64, 20, 32)
        peaks = []
        for micro_batch in (64, 16):
            tracker.peak_bytes = 0
            train(tower, x, micro_batch)
            peaks.append(tracker.peak_bytes)
        live, peak = tracker.live_bytes, tracker.peak_bytes
        train(tower, x, 16, steps=3)
        assert (tracker.live_bytes, tracker.peak_bytes) == (live, peak)
    assert peaks[1] < 0.5 * peaks[0]


def test_a_step_larger_than_any_machine_is_measured_without_memory() -> None:
    with FakeTensorMode():
        usage = measure(PeakMemory(), micro_batch=1 << 20, batch=1 << 20)
    assert usage.peak_bytes > 300 << 30


def test_without_a_tracker_the_marks_of_a_step_do_nothing() -> None:
    x = torch.ones(3, requires_grad=True)
    with tracker_module.phase("loss"):
        assert tracker_module.loss_ends_at(x) is x
    x.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(3))


def test_a_limit_ends_the_run_at_the_operation_that_passes_it() -> None:
    done = []
    with pytest.raises(OverLimit), tracing(limit_bytes=3 << 20) as tracker:
        for _ in range(10):
            done.append(torch.zeros(1 << 18))  # 1 MiB each
    assert len(done) == 3 and tracker.peak_bytes == 4 << 20
    with tracing(limit_bytes=4 << 20):
        kept = [torch.zeros(1 << 18) for _ in range(4)]
    assert len(kept) == 4, "exactly the limit is allowed"


def test_what_waits_on_the_host_is_not_counted() -> None:
    with tracing() as tracker:
        weight = torch.zeros(1 << 10)
        with phase(HOST):
            batch = torch.zeros(1 << 20)
        assert tracker.live_bytes == tracker.peak_bytes == 4 << 10
        part = batch[: 1 << 18].clone()  # what a transfer makes
        assert tracker.live_bytes == (4 << 10) + (1 << 20)
        del part
        assert tracker.live_bytes == 4 << 10 and weight.numel()
