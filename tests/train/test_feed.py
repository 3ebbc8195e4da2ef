"""From batches on the host to samples on the device, in turn with the network or beside it."""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from medseg.augment.pipeline import Augmenter
from medseg.augment.streams import sample_seed
from medseg.data.loader import Batch, batches
from medseg.data.patches import Patch
from medseg.errors import DatasetError
from medseg.labels import LabelScheme
from medseg.schema.recipe import AugmentationRecipe
from medseg.train.feed import Preparer, Samples, feed, placed
from medseg.train.timing import Clock

IGNORING = LabelScheme(labels={"background": 0, "organ": 1, "lesion": 2}, ignore_label=3)
PATCH = (8, 16, 12)


class Log:
    """A clock and the streams of a device that has none, which write down what is asked of them."""

    def __init__(self):
        self.events = []
        self.is_aside = False
        self.held = []

    @contextmanager
    def part(self, name):
        self.events.append(f"{name}{' aside' if self.is_aside else ''}")
        yield

    @contextmanager
    def aside(self):
        self.is_aside = True
        try:
            yield
        finally:
            self.is_aside = False

    def mark(self):
        assert self.is_aside
        self.events.append("mark")
        return len(self.events)

    def hand_over(self, samples, mark):
        assert not self.is_aside
        assert self.events[mark - 1] == "mark"
        self.events.append(f"hand over {samples.case_ids[0]}")
        self.held.append(mark)
        return samples


class Naming:
    """A preparer that only passes on which case a batch is of; it may fail at one."""

    def __init__(self, log, streams, fail_at=None):
        self.log, self.streams, self.fail_at = log, streams, fail_at

    def __call__(self, batch, *, augment):
        (case,) = batch.case_ids
        self.log.events.append(f"prepare {case}")
        if case == self.fail_at:
            raise DatasetError(f"{case} cannot be prepared")
        nothing = torch.zeros(1)
        return Samples(images=nothing, target=nothing, valid=None, annotated=None, case_ids=(case,))


def named(*cases, fail_at=None):
    """Yield a batch of one patch for each case."""
    for index, case in enumerate(cases):
        if case == fail_at:
            raise DatasetError(f"{case} cannot be read")
        nothing = np.zeros((1, 2), np.float32)
        patch = Patch(
            image=nothing, segmentation=nothing[0], outside=None, case_id=case, index=index
        )
        yield Batch(patches=(patch,))


def test_without_a_stream_each_batch_is_prepared_where_it_is_asked_for():
    log = Log()
    for samples in feed(named("a", "b"), Naming(log, None), log):
        log.events.append(f"step {samples.case_ids[0]}")
    assert log.events == [
        *("wait", "augment", "prepare a", "step a"),
        *("wait", "augment", "prepare b", "step b"),
        "wait",
    ]


def test_beside_the_network_the_next_batch_is_asked_for_before_one_is_handed_over():
    """A batch waits for its own mark only, not for that of the batch after it."""
    log = Log()
    for samples in feed(named("a", "b", "c"), Naming(log, log), log):
        log.events.append(f"step {samples.case_ids[0]}")
    assert log.events == [
        *("wait", "augment aside", "prepare a", "mark"),
        *("wait", "augment aside", "prepare b", "mark", "hand over a", "step a"),
        *("wait", "augment aside", "prepare c", "mark", "hand over b", "step b"),
        *("wait", "hand over c", "step c"),
    ]
    assert log.held == [4, 8, 14]


@pytest.mark.parametrize("has_stream", [False, True])
@pytest.mark.parametrize("where", ["read", "prepared"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_error_is_raised_at_its_own_batch(has_stream, where, number):
    log, cases = Log(), ("a", "b", "c")
    preparer = Naming(
        log, log if has_stream else None, cases[number] if where == "prepared" else ""
    )
    source = feed(named(*cases, fail_at=cases[number] if where == "read" else ""), preparer, log)
    assert [next(source).case_ids for _ in range(number)] == [(case,) for case in cases[:number]]
    with pytest.raises(DatasetError, match=f"{cases[number]} cannot be {where}"):
        next(source)


@pytest.mark.parametrize("has_stream", [False, True])
@pytest.mark.parametrize("end", ["close", "error", "exhaustion"])
def test_its_end_closes_the_batches(has_stream, end):
    log, closed = Log(), []

    def source():
        try:
            yield from named("a", "b", "c", "d", "e")
        finally:
            closed.append(True)

    fed = feed(source(), Naming(log, log if has_stream else None, "c"), log)
    assert next(fed).case_ids == ("a",)
    if end == "close":
        fed.close()
    elif end == "error":
        with pytest.raises(DatasetError):
            list(fed)
    else:
        list(feed(source(), Naming(log, None), log))
        fed.close()
    assert closed


def test_closing_ends_the_threads_that_cut(tiny):
    run = tiny()
    with closing(run.samples()) as source:
        next(source)
        assert [t for t in threading.enumerate() if t.name.startswith("medseg-patches")]
    assert not [t for t in threading.enumerate() if t.name.startswith("medseg-patches")]


def test_samples_beside_the_network_are_those_in_turn_with_it(tiny):
    run = tiny()
    with closing(run.samples()) as source:
        expected = list(islice(source, 4))
    run.preparer.streams = Log()
    with closing(run.samples()) as source:
        found = list(islice(source, 4))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.case_ids == theirs.case_ids
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.target, theirs.target)


def augmenter(num_previous=0, backend="torch"):
    recipe = AugmentationRecipe(backend=backend, rotation_probability=1.0)
    return Augmenter(
        recipe, PATCH, mask_channels=(True, False), dummy_2d=False, num_previous=num_previous
    )


def batch_of(seed=0, size=(2, 12, 22, 20), *, has_previous=False, kind=np.uint8):
    """Return three patches larger than the network's, with an outside mask and ignored voxels."""
    rng = np.random.default_rng(seed)
    patches = [
        Patch(
            image=rng.normal(size=size).astype(np.float32),
            segmentation=rng.integers(0, 4, size[1:]).astype(kind),
            outside=rng.random(size[1:]) < 0.2,
            case_id=f"case_{index}",
            index=17 * index,
            previous=rng.integers(0, 3, size[1:]).astype(kind) if has_previous else None,
        )
        for index in range(3)
    ]
    return Batch(patches=tuple(patches))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_training_samples_are_what_the_augmenter_makes_of_each_patch(kind):
    """One patch at a time: label maps become a target and a mask of voxels that count."""
    batch = batch_of(kind=kind)
    found = Preparer(augmenter(), IGNORING, torch.device("cpu"), 5)(batch, augment=True)
    assert found.case_ids == ("case_0", "case_1", "case_2")
    assert found.annotated is None
    for b, patch in enumerate(batch.patches):
        image, segmentation, _ = augmenter()(
            torch.from_numpy(patch.image)[None],
            torch.from_numpy(patch.segmentation.astype(np.int32))[None],
            torch.from_numpy(patch.outside)[None],
            seeds=[sample_seed(5, 17 * b)],
        )
        torch.testing.assert_close(found.images[b], image[0], rtol=0, atol=0)
        assert torch.equal(found.valid[b], segmentation[0] != 3)
        assert torch.equal(found.target[b], torch.where(segmentation[0] == 3, 0, segmentation[0]))
    assert found.target.dtype == torch.int64
    assert (found.target > 0).any()
    assert len(found.tensors) == 3


def test_validation_samples_are_the_patches_themselves():
    batch = batch_of()
    found = Preparer(augmenter(), IGNORING, torch.device("cpu"), 5)(batch, augment=False)
    for b, patch in enumerate(batch.patches):
        np.testing.assert_array_equal(found.images[b], patch.image)
        np.testing.assert_array_equal(found.target[b] * found.valid[b], patch.segmentation % 3)


def test_what_the_stage_before_found_becomes_channels():
    """In validation as it is; in training deformed as the labels are, beside the same image."""
    batch = batch_of(has_previous=True)
    preparer = Preparer(augmenter(2), IGNORING, torch.device("cpu"), 5)
    judged = preparer(batch, augment=False)
    assert judged.images.shape == (3, 4, 12, 22, 20)
    for b, patch in enumerate(batch.patches):
        np.testing.assert_array_equal(judged.images[b, :2], patch.image)
        for label in (1, 2):
            np.testing.assert_array_equal(judged.images[b, 1 + label], patch.previous == label)
    learnt = preparer(batch, augment=True)
    assert learnt.images.shape == (3, 4, *PATCH)
    plain = Batch(patches=tuple(replace(patch, previous=None) for patch in batch.patches))
    alone = Preparer(augmenter(), IGNORING, torch.device("cpu"), 5)(plain, augment=True)
    torch.testing.assert_close(learnt.images[:, :2], alone.images, rtol=0, atol=0)
    assert set(learnt.images[:, 2:].unique().tolist()) == {0.0, 1.0}


def test_placing_a_patch_elsewhere_moves_every_array_and_nothing_else():
    patch = batch_of(has_previous=True, kind=np.uint16).patches[1]
    seen = []

    def place(array):
        seen.append(array)
        return array.copy()

    found = placed(patch, place)
    assert len(seen) == 4
    assert found.segmentation.dtype == found.previous.dtype == np.int32  # torch lacks uint16
    for name in ("image", "segmentation", "outside", "previous"):
        np.testing.assert_array_equal(getattr(found, name), getattr(patch, name))
    assert (found.case_id, found.index, found.annotated) == ("case_1", 17, None)
    assert placed(replace(patch, outside=None, previous=None), place).previous is None


def test_patches_stay_where_they_are_on_the_cpu():
    patch = batch_of().patches[0]
    assert Preparer(augmenter(), IGNORING, torch.device("cpu"), 0).pinned(patch) is patch


def test_the_clock_is_told_of_waiting_and_augmentation(tiny):
    run = tiny()
    with closing(run.samples()) as source:
        list(islice(source, 3))
    seconds = run.trainer.clock.read()
    assert seconds["augment"] > 0
    assert seconds["wait"] > 0
    assert seconds["forward"] == seconds["backward"] == 0


def needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.mark.gpu
def test_on_cuda_samples_are_right_while_the_network_is_behind():
    """The network's stream lags; memory of its samples must not be taken for later ones."""
    device = needs_cuda()
    host = [batch_of(seed, has_previous=True) for seed in range(12)]
    preparer = Preparer(augmenter(2), IGNORING, device, 5)
    pinned = [Batch(patches=tuple(map(preparer.pinned, batch.patches))) for batch in host]
    assert torch.from_numpy(pinned[0].patches[0].image).is_pinned()
    copies = []
    for samples in feed(iter(pinned), preparer, Clock(device)):
        torch.cuda._sleep(20_000_000)  # the step: reads its samples late
        copies.append([tensor.clone() for tensor in samples.tensors])
        del samples
    for batch, found in zip(host, copies, strict=True):
        expected = preparer(batch, augment=True)
        torch.cuda.synchronize()
        for ours, theirs in zip(found, expected.tensors, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_on_cuda_nothing_waits_for_the_device():
    device = needs_cuda()
    preparer = Preparer(augmenter(2), IGNORING, device, 5)
    host = [batch_of(seed, has_previous=True) for seed in range(6)]
    pinned = [Batch(patches=tuple(map(preparer.pinned, batch.patches))) for batch in host]
    list(feed(iter(pinned), preparer, Clock(device)))  # makes tables and memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(feed(iter(pinned), preparer, Clock(device)))
        list(feed(iter(pinned), preparer, Clock(device), augment=False))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_cuda_threads_of_the_loader_pin_what_they_cut(tiny):
    device = needs_cuda()
    run = tiny()
    preparer = Preparer(run.preparer.augmenter, run.preparer.labels, device, run.preparer.seed)
    with closing(batches(run.sampler, first=0, finish=preparer.pinned)) as source:
        for patch in next(source).patches:
            assert torch.from_numpy(patch.image).is_pinned()
            assert torch.from_numpy(patch.segmentation).is_pinned()
