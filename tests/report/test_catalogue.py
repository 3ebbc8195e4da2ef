"""The catalogue as text: nothing that was not verified looks as if it were."""

from __future__ import annotations

from medseg.api.catalogue import read_catalogue
from medseg.report.catalogue import format_model, format_models, format_note
from medseg.schema.catalogue import CatalogueEntry

KNOWN = CatalogueEntry(
    name="Task003_Liver",
    task="liver and its tumours",
    modality=("CT",),
    labels=("liver", "liver tumour"),
    format="nnunet v1",
    configurations=("2d", "3d_fullres"),
    size_bytes=1_234_567_890,
    licence="CC BY 4.0",
    address="https://a.org/record/1/files/Liver.zip?download=1",
    checksum=f"md5:{'a1' * 16}",
    source=("one page", "another page"),
)
UNKNOWN = CatalogueEntry(
    name="A",
    task="spleen",
    format="totalsegmentator",
    address="https://a.org/b.zip",
    source=("one page",),
    unverified=("modality", "labels", "configurations", "size_bytes", "licence", "checksum"),
)


def test_the_list_says_what_is_not_verified():
    rows = format_models([KNOWN, UNKNOWN], 9).splitlines()
    assert rows[2].split("  ")[0] == "Task003_Liver"
    assert "1.23 GB" in rows[2]
    assert rows[2].endswith("CC BY 4.0")
    assert rows[3].strip() == "liver and its tumours"
    assert rows[4].split() == ["A", "not", "verified", "not", "verified"]
    assert rows[-1] == "2 of 9 models"
    assert format_models([], 9) == "None of the 9 models of the catalogue matches."


def test_every_field_is_shown():
    assert format_model(KNOWN).splitlines() == [
        "name            Task003_Liver",
        "task            liver and its tumours",
        "images          CT",
        "labels          2: liver, liver tumour",
        "format          nnunet v1",
        "configurations  2: 2d, 3d_fullres",
        "size            1.23 GB (1234567890 bytes)",
        "licence         CC BY 4.0",
        "address         https://a.org/record/1/files/Liver.zip?download=1",
        f"checksum        md5:{'a1' * 16}",
        "source          one page",
        "                another page",
    ]


def test_every_empty_field_is_said_not_to_be_verified():
    rows = dict(line.split(None, 1) for line in format_model(UNKNOWN).splitlines())
    for title in ("images", "labels", "configurations", "size", "licence", "checksum"):
        assert rows[title] == "not verified", title


def test_lines_fit_a_terminal_but_for_addresses():
    catalogue = read_catalogue()
    lines = format_models(catalogue.models, len(catalogue.models)).splitlines()
    for entry in catalogue.models:
        lines += format_model(entry).splitlines()
    wide = [line for line in lines if len(line) > 80]
    assert all(line.startswith(("address ", "name ")) for line in wide)
    assert all(line == line.rstrip() for line in lines)


def test_only_part_of_a_procedure_is_called_so():
    assert "is the network alone" in format_note(UNKNOWN)
    assert format_note(KNOWN) == ""
