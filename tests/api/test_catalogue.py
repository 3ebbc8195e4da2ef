"""Public models by name: what the catalogue says, and the way from an archive to a bundle."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import pytest

from medseg.api import catalogue as module
from medseg.api.catalogue import fetch, find_model, matching, read_catalogue
from medseg.bundles.members import read_any
from medseg.errors import BundleError, ConfigError
from medseg.schema.base import validate
from medseg.schema.catalogue import MAY_BE_UNVERIFIED, Catalogue, CatalogueEntry, DownloadRecord
from tests.interop.nnunet.v2_folders import (
    make_architecture,
    make_configuration,
    make_dataset,
    make_plans,
    make_state,
    write_model,
)

MODELS = Path(__file__).parents[3] / "shared/data/nnunet_models"
CONTENT = b"an archive" * 100
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
KNOWN = {
    "name": "Task003_Liver",
    "task": "liver and its tumours",
    "modality": ("CT",),
    "labels": ("liver", "liver tumour"),
    "format": "nnunet v1",
    "configurations": ("2d", "3d_fullres"),
    "size_bytes": len(CONTENT),
    "licence": "CC BY 4.0",
    "address": "https://a.org/record/1/files/Liver.zip?download=1",
    "checksum": f"md5:{MD5}",
    "source": ("a page",),
}
UNKNOWN = {
    **KNOWN,
    "name": "Task009_Spleen",
    "labels": ("spleen",),
    "address": "https://a.org/record/1/files/Task009_Spleen.zip",
    "size_bytes": None,
    "licence": "",
    "checksum": "",
    "configurations": (),
    "unverified": ("size_bytes", "licence", "checksum", "configurations"),
}


def make_catalogue(*entries):
    return validate(Catalogue, {"models": entries or (KNOWN, UNKNOWN)}, "a test")


@pytest.fixture
def mirror(tmp_path):
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name in ("Liver.zip", "Task009_Spleen.zip"):
        (folder / name).write_bytes(CONTENT)
    return folder


class Importer:
    """Notes what it is asked for, and writes something where the bundle goes."""

    def __init__(self):
        self.calls = []

    def __call__(self, path, output, *, configuration=None):
        self.calls.append((path, output, configuration))
        output.mkdir(exist_ok=True)
        (output / "bundle.json").write_bytes(path.read_bytes())


class TestEntries:
    def test_the_catalogue_is_valid(self):
        entries = read_catalogue().models
        assert len(entries) == 83
        assert {one.format for one in entries} == {"nnunet v1", "totalsegmentator"}

    def test_every_task_of_the_first_version_is_there(self):
        """Task082 and Task115 are several archives."""
        entries = [one for one in read_catalogue().models if one.format == "nnunet v1"]
        numbers = sorted({int(one.name[4:7]) for one in entries})
        assert numbers == [
            *range(1, 11), 17, 24, 27, 29, 35, 38, 48, 55, 61, 75, 76, 82, 89, 114, 115, 135,
        ]  # fmt: skip
        assert len(entries) == 24 + 4 + 5
        assert all(one.address.startswith("https://zenodo.org/record/") for one in entries)

    def test_no_size_and_no_checksum_is_made_up(self):
        """None could be read anywhere; whoever adds one adds where it was read."""
        for one in read_catalogue().models:
            assert {"size_bytes", "checksum"} <= set(one.unverified), one.name

    def test_addresses_are_safe_and_names_are_those_of_files(self):
        for one in read_catalogue().models:
            assert one.address.startswith("https://"), one.name
            assert re.fullmatch(r"[\w.-]+\.zip", one.file_name), one.name

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"licence": ""}, "unverified is"),
            ({"unverified": ("licence",)}, "unverified is"),
            ({"unverified": ("address",)}, "unverified is"),
            ({"checksum": "md5:12"}, "checksum"),
            ({"checksum": f"sha1:{'a' * 40}"}, "checksum"),
            ({"address": "ftp://a.org/b.zip"}, "address"),
            ({"address": "https://a.org"}, "address"),
            ({"size_bytes": 0}, "size_bytes"),
            ({"format": "nnunet v3"}, "format"),
            ({"source": ()}, "source"),
        ],
    )
    def test_wrong_entries_are_refused(self, change, message):
        with pytest.raises(ConfigError, match=message):
            validate(CatalogueEntry, {**KNOWN, **change}, "a test")

    def test_names_and_files_are_distinct(self):
        with pytest.raises(ConfigError, match="Task003_Liver stands there more than once"):
            make_catalogue(KNOWN, KNOWN)
        with pytest.raises(ConfigError, match=r"Liver\.zip stands there more than once"):
            make_catalogue(KNOWN, {**UNKNOWN, "address": "https://b.org/Liver.zip"})

    def test_every_field_that_may_be_empty_is_a_field(self):
        assert set(MAY_BE_UNVERIFIED) <= set(CatalogueEntry.model_fields)


class TestFinding:
    @pytest.mark.parametrize(
        ("word", "expected"),
        [
            ("", ["Task003_Liver", "Task009_Spleen"]),
            ("LIVER_tumour", ["Task003_Liver"]),
            ("task009", ["Task009_Spleen"]),
            ("nnunet v1", ["Task003_Liver", "Task009_Spleen"]),
            ("kidney", []),
        ],
    )
    def test_a_word_is_looked_for_everywhere(self, word, expected):
        assert [one.name for one in matching(word, make_catalogue())] == expected

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("Task03_Liver", "Did you mean 'Task003_Liver'?"),
            ("spleen", "It is found in: Task009_Spleen."),
            ("zzz", "'models list' shows them."),
        ],
    )
    def test_a_misspelt_name_gets_near_ones(self, name, hint):
        with pytest.raises(ConfigError) as caught:
            find_model(name, make_catalogue())
        assert str(caught.value).endswith(hint)


class TestFetch:
    def test_a_mirror_is_verified_and_imported(self, mirror, tmp_path):
        importer = Importer()
        fetched = fetch(
            "Task003_Liver", tmp_path / "liver", mirror=mirror, configuration="2d",
            workspace=tmp_path / "work", catalogue=make_catalogue(), importer=importer,
        )  # fmt: skip
        assert importer.calls == [(mirror / "Liver.zip", tmp_path / "liver", "2d")]
        assert (fetched.archive, fetched.sha256) == (mirror / "Liver.zip", SHA256)
        assert (fetched.bundle, fetched.entry.name) == (tmp_path / "liver", "Task003_Liver")
        assert not (tmp_path / "work").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [(CONTENT[:-1], "has 999 bytes, expected 1000"), (b"x" * 1000, f"expected {MD5}")],
    )
    def test_what_is_not_the_published_file_is_not_imported(
        self, mirror, tmp_path, content, message
    ):
        (mirror / "Liver.zip").write_bytes(content)
        importer = Importer()
        with pytest.raises(BundleError, match=message):
            fetch("Task003_Liver", tmp_path / "liver", mirror=mirror, catalogue=make_catalogue(),
                  importer=importer)  # fmt: skip
        assert importer.calls == []

    def test_a_file_that_the_mirror_lacks_is_named(self, mirror, tmp_path):
        (mirror / "Liver.zip").rename(mirror / "liver.zip")
        with pytest.raises(BundleError, match=r"mirror/Liver\.zip: no such file.*'liver\.zip'"):
            fetch("Task003_Liver", tmp_path / "x", mirror=mirror, catalogue=make_catalogue())
        with pytest.raises(BundleError, match="nothing is there"):
            fetch("Task003_Liver", tmp_path / "x", mirror=tmp_path / "no",
                  catalogue=make_catalogue())  # fmt: skip

    def test_without_a_mirror_it_is_downloaded_to_the_workspace(self, tmp_path, monkeypatch):
        asked = []

        def download(address, file, **options):
            asked.append((address, file, options))
            file.parent.mkdir(parents=True)
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("a", b"b")
            return DownloadRecord(address=address, size_bytes=1, sha256=SHA256)

        monkeypatch.setattr(module, "download", download)
        monkeypatch.setattr(module, "_import_nnunet", lambda *places, **options: None)
        fetched = fetch("Task003_Liver", tmp_path / "x", workspace=tmp_path / "work",
                        catalogue=make_catalogue())  # fmt: skip
        archive = tmp_path / "work/downloads/Liver.zip"
        options = {"checksum": f"md5:{MD5}", "size_bytes": len(CONTENT), "progress": False}
        assert asked == [(KNOWN["address"], archive, options)]
        assert (fetched.archive, fetched.sha256) == (archive, SHA256)

    def test_a_page_instead_of_the_archive_is_not_kept(self, tmp_path, monkeypatch):
        def download(address, file, **options):
            file.parent.mkdir(parents=True)
            file.write_text("<html>Down for maintenance</html>")
            file.with_name(f"{file.name}.json").write_text("{}")
            return DownloadRecord(address=address, size_bytes=33, sha256=SHA256)

        monkeypatch.setattr(module, "download", download)
        importer = Importer()
        with pytest.raises(BundleError, match="33 bytes that are no whole zip archive"):
            fetch("Task009_Spleen", tmp_path / "x", workspace=tmp_path / "work",
                  catalogue=make_catalogue(), importer=importer)  # fmt: skip
        assert importer.calls == []
        assert list((tmp_path / "work/downloads").iterdir()) == []

    @pytest.mark.parametrize("name", ["a file", "a folder"])
    def test_a_place_that_is_taken_is_refused_before_anything_is_downloaded(
        self, mirror, tmp_path, name
    ):
        output = tmp_path / name
        if name == "a folder":
            output.mkdir()
            (output / "thesis.txt").write_text("years")
        else:
            output.write_text("years")
        importer = Importer()
        with pytest.raises(BundleError, match=f"{name}: is there already, and no bundle"):
            fetch("Task003_Liver", output, mirror=mirror, catalogue=make_catalogue(),
                  importer=importer)  # fmt: skip
        assert importer.calls == []

    def test_an_empty_folder_and_an_earlier_bundle_may_be_replaced(self, mirror, tmp_path):
        (tmp_path / "x").mkdir()
        for _ in range(2):
            fetch("Task009_Spleen", tmp_path / "x", mirror=mirror, catalogue=make_catalogue(),
                  importer=Importer())  # fmt: skip
        assert (tmp_path / "x/bundle.json").read_bytes() == CONTENT

    def test_a_configuration_that_is_known_not_to_be_there_is_refused(self, mirror, tmp_path):
        options = {"mirror": mirror, "catalogue": make_catalogue(), "importer": Importer()}
        with pytest.raises(ConfigError, match=r"expected one of: 2d, 3d_fullres\. Did you mean"):
            fetch("Task003_Liver", tmp_path / "x", configuration="3d_full", **options)
        fetch("Task009_Spleen", tmp_path / "x", configuration="3d_full", **options)

    @pytest.mark.skipif(not MODELS.is_dir(), reason="needs ../shared/data/nnunet_models")
    @pytest.mark.parametrize(
        ("model", "name", "inside", "folds"),
        [
            ("v1_iso", "Task009_Spleen",
             "nnUNet/3d_fullres/Task009_Spleen/nnUNetTrainerV2__nnUNetPlansv2.1",
             ("fold_0", "fold_1")),
            ("v2_aniso", "Dataset150_icb_v0",
             "Dataset150_icb_v0/nnUNetTrainer__nnUNetPlans__3d_fullres", ("fold_0",)),
        ],
    )  # fmt: skip
    def test_archives_as_their_owners_pack_them_become_bundles(
        self, tmp_path, model, name, inside, folds
    ):
        archive = tmp_path / read_file_name(name)
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
            for path in sorted((MODELS / model).rglob("*")):
                relative = path.relative_to(MODELS / model)
                if path.is_file() and relative.parts[0] not in ("in", "out"):
                    opened.write(path, f"{inside}/{relative.as_posix()}")
        fetch(name, tmp_path / "bundle", mirror=tmp_path)
        bundle = read_any(tmp_path / "bundle")
        (part,) = getattr(bundle, "members", {"": bundle}).values()
        assert part.manifest.folds == folds
        assert len(bundle.spec.channels) == 2
        assert not [path for path in bundle.folder.rglob("*") if path.suffix in (".pkl", ".pth")]


def read_file_name(name):
    return find_model(name, read_catalogue()).file_name


@pytest.mark.parametrize(("number", "kind"), [(297, "chain"), (291, "single")])
def test_a_task_of_totalsegmentator_becomes_a_chain_and_a_part_a_network(tmp_path, number, kind):
    dataset = f"Dataset{number}_TotalSegmentator_part"
    folder = tmp_path / "files" / dataset / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    state = make_state(make_architecture(), num_inputs=1)
    write_model(
        folder, dataset=make_dataset(channel_names={"0": "CT"}), plans=one_channel(),
        states={"fold_0": state},
    )  # fmt: skip
    (tmp_path / "mirror").mkdir()
    with zipfile.ZipFile(tmp_path / "mirror/part.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "files"))
    entry = {
        **UNKNOWN,
        "name": "part",
        "format": "totalsegmentator",
        "address": "https://a.org/part.zip",
    }
    fetched = fetch(
        "part", tmp_path / "bundle", mirror=tmp_path / "mirror", catalogue=make_catalogue(entry)
    )
    assert read_any(fetched.bundle).manifest.kind == kind
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "files", "mirror"]


def one_channel():
    """Return plans of a model that sees CT alone."""
    entry = make_configuration(normalization_schemes=["CTNormalization"], use_mask_for_norm=[False])
    return make_plans({"3d_fullres": entry})
