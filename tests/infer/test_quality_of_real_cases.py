"""Quality control on real images: few flags on the cases themselves, a flag for planted errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medseg.api.prepare import fingerprint
from medseg.data.case import load_case
from medseg.data.facts import intensities, summarise
from medseg.data.workspace import Workspace
from medseg.geometry import Grid
from medseg.infer.export import volumes_ml
from medseg.infer.quality import image_flags, segmentation_flags
from medseg.io.read import read_image
from medseg.labels import LabelScheme
from medseg.schema.fingerprint import CaseFingerprint

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
HIPPOCAMPUS = SHARED / "Task04_Hippocampus"
CT = SHARED / "ct_sample" / "example_ct_sm.nii.gz"


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory, few_samples):
    """Labels, cases and fingerprints of the whole dataset, measured as preparing does it."""
    if not HIPPOCAMPUS.is_dir():
        pytest.skip(f"no dataset at {HIPPOCAMPUS}")
    work = tmp_path_factory.mktemp("hippocampus")
    with few_samples():
        fingerprint(HIPPOCAMPUS, workspace=work, workers=1)
    folder, _ = Workspace(work).find(HIPPOCAMPUS)
    spec = folder.spec()
    cases = {name: load_case(spec, name) for name in spec.cases}
    return LabelScheme.from_spec(spec), cases, folder.fingerprint().cases


def flags_of(case, scheme, record, *, channels=None, segmentation=None, affine=None):
    channels = case.channels if channels is None else channels
    segmentation = case.segmentation if segmentation is None else segmentation
    grid = case.grid if affine is None else Grid(case.grid.shape, affine)
    return image_flags(channels, grid, ["MRI"], record) + segmentation_flags(
        segmentation,
        grid.affine,
        scheme.structures,
        volumes_ml(segmentation, grid.affine, scheme),
        record,
    )


def test_few_real_cases_flag_when_left_out_of_the_record(hippocampus):
    scheme, cases, facts = hippocampus
    flagged = {}
    for name, case in cases.items():
        record = summarise([other for key, other in facts.items() if key != name])
        if flags := flags_of(case, scheme, record):
            flagged[name] = flags
    assert len(flagged) <= 0.03 * len(cases), flagged


def test_real_cases_are_silent_against_their_own_record(hippocampus):
    scheme, cases, facts = hippocampus
    record = summarise(list(facts.values()))
    assert {n: f for n, c in cases.items() if (f := flags_of(c, scheme, record))} == {}


def test_planted_errors_flag_in_nearly_every_real_case(hippocampus):
    scheme, cases, facts = hippocampus
    record = summarise(list(facts.values()))
    caught = {"half": 0, "cut": 0, "spacing": 0, "missing": 0}
    chosen = list(cases.values())[::4]
    for case in chosen:
        labels = case.segmentation
        half = labels.copy()
        half[np.indices(labels.shape).sum(0) % 2 == 0] = 0
        flags = flags_of(case, scheme, record, segmentation=half)
        caught["half"] += any(" ml, usually " in flag for flag in flags)
        middle = int(np.median(np.nonzero(labels)[1]))
        cut = case.channels[:, :, middle:], labels[:, middle:]
        flags = segmentation_flags(
            cut[1], case.grid.affine, scheme.structures,
            volumes_ml(cut[1], case.grid.affine, scheme), record,
        )  # fmt: skip
        caught["cut"] += any("touches the image border, mostly posterior" in f for f in flags)
        swapped = case.grid.affine @ np.diag([3.0, 1.0, 1 / 3, 1.0])
        flags = flags_of(case, scheme, record, affine=swapped)
        caught["spacing"] += [flag.startswith("voxel size") for flag in flags] == [True]
        missing = np.where(labels == 1, 0, labels)
        flags = flags_of(case, scheme, record, segmentation=missing)
        caught["missing"] += flags == ("Anterior was not found, all 200 training cases have it",)
    assert min(caught.values()) >= 0.95 * len(chosen), caught


@pytest.fixture(scope="module")
def slabs():
    """A real CT in overlapping slabs, which stand for as many cases; each with its facts."""
    if not CT.is_file():
        pytest.skip(f"no image at {CT}")
    image = read_image(CT)
    found = []
    for start in range(0, image.array.shape[2] - 6, 2):
        channels = np.float32(image.array[None, :, :, start : start + 6])
        grid = Grid(channels.shape[1:], image.affine)
        facts = CaseFingerprint(
            shape=grid.shape,
            shape_cropped=grid.shape,
            spacing=grid.spacing,
            intensities=intensities(channels, grid.affine),
        )
        found.append((channels, grid, facts))
    return found


@pytest.mark.parametrize(
    ("change", "is_flagged"),
    [
        (lambda hu: hu, False),
        (lambda hu: hu + 1024, True),
        (lambda hu: hu - 1024, True),
        (lambda hu: np.clip(hu + 1024, 0, None) / 4096, True),
        (lambda hu: np.clip((hu + 160) / 400 * 255, 0, 255), True),
        (lambda hu: -hu, True),
    ],
    ids=["healthy", "intercept +1024", "intercept -1024", "to 0..1", "windowed", "inverted"],
)
def test_real_ct_flags_when_its_values_are_not_hounsfield_units(slabs, change, is_flagged):
    for number, (channels, grid, _) in enumerate(slabs):
        record = summarise([facts for _, _, facts in slabs[:number] + slabs[number + 1 :]])
        flags = image_flags(np.float32(change(channels)), grid, ["CT"], record)
        assert [flag.startswith("channel CT: ") for flag in flags] == [True] * is_flagged, flags
