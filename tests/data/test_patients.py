"""Ids that look like the same patient, and those that do not."""

from __future__ import annotations

import pytest

from medseg.data.patients import find_patients, patient_of

BRATS = [f"BraTS-GLI-{n:05d}-{v:03d}" for n in range(9) for v in range(1 + n % 2)]


@pytest.mark.parametrize(
    ("ids", "patients"),
    [
        (["sub-01_ses-2", "sub-01_ses-1", "sub-2"], {"sub-01"}),
        (["sub-01", "sub-02"], set()),
        (["patient001_frame01", "patient001_frame12", "patient002_frame01"], {"patient001"}),
        (["pat 7 left", "pat 7 right", "pat 8 left"], {"pat 7"}),
        (["patient_1_a", "patient_1_b", "patient_2_a"], {"patient_1"}),
        (["0017_L", "0017_R", "0018_L"], {"0017"}),
        (["S12_20200101", "S12_20210304", "S13_20200101"], {"S12"}),
        (["SC-HF-I-04_ED", "SC-HF-I-05_ED", "SC-HYP-04_ED"], set()),
        (["hippocampus_001", "hippocampus_002", "hippocampus_003"], set()),
        (["scan_1", "scan_2", "scan_3"], set()),
        (["t1", "t2", "t2s", "mt0", "mt1"], set()),
        (["0e21d7b3", "0e4c2e27"], set()),
        (BRATS, {f"BraTS-GLI-{n:05d}" for n in (1, 3, 5, 7)}),
        ([f"site{s:02d}_{n:03d}" for s in range(6) for n in range(40)], set()),
    ],
    ids=lambda value: str(sorted(value))[:30],
)
def test_patients_with_several_cases(ids, patients):
    found = find_patients(ids)
    assert set(found.values()) == patients
    assert all(case.startswith(patient) for case, patient in found.items())


def test_order_of_the_ids_does_not_matter():
    assert find_patients(BRATS) == find_patients(reversed(BRATS))


def test_patient_of_a_single_case():
    assert patient_of("sub-9_T1w") == "sub-9"
    assert patient_of("whatever") == "whatever"
