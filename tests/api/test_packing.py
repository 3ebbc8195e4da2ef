"""Bundles as one file: the same bytes each time, nothing but the bundle, verified both ways."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import zipfile

import numpy as np
import pytest
import torch

from medseg import load
from medseg.api import packing
from medseg.api.packing import join, opened_bundle, pack, unpack
from medseg.bundles.bundle import read_bundle, write_bundle
from medseg.bundles.members import write_chain
from medseg.errors import BundleError, ConfigError, DatasetError
from medseg.models.build import build_network
from medseg.schema.bundle import Chain, ChainPart, Semantics
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Architecture, Configuration, Plans

STATISTICS = IntensityStatistics(
    mean=40, std=30, median=35, min=-90, max=200, percentile_00_5=-60, percentile_99_5=160
)


def make_plans(name, previous=None):
    entry = Configuration(
        patch_size=(8, 16, 12),
        batch_size=2,
        spacing=(2.0, 0.9, 1.2),
        median_shape=(16.0, 24.0, 20.0),
        normalization=("ct",),
        use_mask_for_norm=(False,),
        batch_dice=False,
        architecture=Architecture(
            kind="plain_unet",
            features=(4, 6),
            kernel_sizes=((1, 3, 3), (3, 3, 3)),
            strides=((1, 1, 1), (1, 2, 2)),
            blocks_encoder=(1, 1),
            blocks_decoder=(1,),
        ),
        previous_stage=previous,
    )
    return Plans(
        name="nnunet",
        dataset="Dataset007_Liver",
        network_axes=(2, 0, 1),
        original_median_spacing=(2.0, 0.9, 1.2),
        original_median_shape=(16.0, 24.0, 20.0),
        intensity=(STATISTICS,),
        configurations={name: entry},
    )


def make(folder, *, name="3d_fullres", previous=None, seed=0, dataset="Dataset007_Liver"):
    """Write a bundle of two folds; its weights are those of no network."""
    weights = torch.rand((7, 300), generator=torch.Generator().manual_seed(seed))
    before = None if previous is None else previous.configuration_name
    return write_bundle(
        folder,
        spec=DatasetSpec(name=dataset, channels=("CT",), labels={"background": 0, "liver": 1}),
        plans=make_plans(name, before),
        configuration=name,
        weights={f"fold_{fold}": {"final": {"a": weights + fold}} for fold in range(2)},
        semantics=Semantics(mirror_axes=(0, 1)),
        previous=None if previous is None else previous.folder,
    )


@pytest.fixture
def bundle(tmp_path):
    return make(tmp_path / "bundle")


@pytest.fixture
def cascade(tmp_path):
    return make(
        tmp_path / "cascade",
        name="3d_cascade_fullres",
        previous=make(tmp_path / "first", name="3d_lowres", seed=5),
    )


def make_chain(folder, **members):
    """Write a bundle whose parts lie in it whole."""
    labels = {"background": 0, **{name: n for n, name in enumerate(members, start=1)}}
    parts = tuple(
        ChainPart(member=name, values={1: value}) for name, value in labels.items() if value
    )
    return write_chain(
        folder,
        spec=DatasetSpec(name="Body", channels=("CT",), labels=labels),
        chain=Chain(spacing=(1.5, 1.5, 3), parts=parts),
        members={name: member.folder for name, member in members.items()},
    ).folder


def contents(folder):
    """Return path -> bytes of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def zipped(path, files, *, top="model/"):
    """Write a zip archive by hand."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{top}{name}", content)
    return path


def left(folder):
    """Return the names of all that lies in a folder, hidden files too."""
    return sorted(os.listdir(folder))


class TestPack:
    def test_it_comes_back_as_it_was(self, bundle, tmp_path):
        archive = pack(bundle.folder, tmp_path / "shared/liver.zip")
        assert archive == tmp_path / "shared/liver.zip"
        assert left(tmp_path / "shared") == ["liver.zip"]
        folder = unpack(archive, tmp_path / "there")
        assert contents(folder) == contents(bundle.folder)
        assert read_bundle(folder).manifest == bundle.manifest

    def test_a_cascade_comes_back_with_its_first_stage(self, cascade, tmp_path):
        folder = unpack(pack(cascade.folder, tmp_path / "a.zip"), tmp_path / "there")
        assert contents(folder) == contents(cascade.folder)
        assert read_bundle(folder).previous.configuration_name == "3d_lowres"

    def test_a_bundle_that_joins_others_comes_back_with_them(self, bundle, cascade, tmp_path):
        chain = make_chain(tmp_path / "chain", organs=bundle, ribs=cascade)
        folder = unpack(pack(chain, tmp_path / "a.zip"), tmp_path / "there")
        found = contents(folder)
        assert found == contents(chain)
        assert "members/ribs/members/previous/weights/fold_1.safetensors" in found

    def test_the_same_bundle_gives_the_same_bytes(self, cascade, tmp_path):
        """Wherever it lies, whatever the archive is called, whenever its files were written."""
        copy = tmp_path / "elsewhere/other name"
        shutil.copytree(cascade.folder, copy)
        for path in copy.rglob("*"):
            os.utime(path, (10**9, 10**9))
        pairs = pack(cascade.folder, tmp_path / "a.zip"), pack(copy, tmp_path / "b.zip")
        assert pairs[0].read_bytes() == pairs[1].read_bytes()

    def test_names_are_sorted_in_one_folder_and_weights_are_not_packed(self, bundle, tmp_path):
        with zipfile.ZipFile(pack(bundle.folder, tmp_path / "a.zip")) as archive:
            entries = archive.infolist()
        names = [entry.filename for entry in entries]
        assert names == sorted(names)
        assert {name.split("/")[0] for name in names} == {"Dataset007_Liver__3d_fullres"}
        packed = {entry.filename: entry.compress_type for entry in entries}
        for name, kind in packed.items():
            stored = name.endswith(".safetensors")
            assert kind == (zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED), name
        assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
        assert {stat.S_IMODE(entry.external_attr >> 16) for entry in entries} == {0o644}

    def test_only_what_the_bundle_lists_is_packed(self, bundle, tmp_path):
        (bundle.folder / "notes.txt").write_text("patient list")
        (bundle.folder / "weights/old.safetensors").write_bytes(b"old")
        with zipfile.ZipFile(pack(bundle.folder, tmp_path / "a.zip")) as archive:
            names = {name.split("/", 1)[1] for name in archive.namelist()}
        assert names == {"bundle.json", *bundle.manifest.sha256}

    def test_a_run_is_packed_by_its_bundle(self, tmp_path):
        make(tmp_path / "run/bundle")
        folder = unpack(pack(tmp_path / "run", tmp_path / "a.zip"), tmp_path / "there")
        assert contents(folder) == contents(tmp_path / "run/bundle")

    @pytest.mark.parametrize("name", ["..", "a/b", "C:x", "Leber \u809d"])
    def test_any_name_of_a_dataset_makes_a_plain_folder(self, tmp_path, name):
        bundle = make(tmp_path / "bundle", dataset=name)
        archive = pack(bundle.folder, tmp_path / "a.zip")
        assert contents(unpack(archive, tmp_path / "there")) == contents(bundle.folder)

    def test_damage_is_refused_before_anything_is_written(self, cascade, tmp_path):
        path = cascade.folder / "members/previous/weights/fold_1.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        (tmp_path / "out").mkdir()
        with pytest.raises(BundleError, match=r"fold_1\.safetensors: sha256 is"):
            pack(cascade.folder, tmp_path / "out/a.zip")
        assert left(tmp_path / "out") == []

    @pytest.mark.parametrize("name", ["a.tar", "a", "folder.zip"])
    def test_the_name_must_be_that_of_an_archive(self, bundle, tmp_path, name):
        (tmp_path / "folder.zip").mkdir()
        with pytest.raises(ConfigError, match=r"expected a file name that ends in \.zip"):
            pack(bundle.folder, tmp_path / name)

    def test_an_earlier_archive_stays_if_the_new_one_cannot_be_read_back(
        self, bundle, tmp_path, monkeypatch
    ):
        (tmp_path / "out").mkdir()
        archive = pack(bundle.folder, tmp_path / "out/a.zip")
        before = archive.read_bytes()

        def flipped(source, target, length):
            target.write(source.read()[:-1] + b"\xff")

        monkeypatch.setattr(packing.shutil, "copyfileobj", flipped)
        with pytest.raises(BundleError) as caught:
            pack(bundle.folder, archive)
        assert "weights/fold_1.safetensors: not read back as it was written" in str(caught.value)
        assert archive.read_bytes() == before
        assert left(tmp_path / "out") == ["a.zip"]

    def test_a_disk_that_is_too_small_is_noticed_first(self, bundle, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=2000)
        monkeypatch.setattr("medseg.io.space.shutil.disk_usage", lambda path: usage)
        with pytest.raises(DatasetError, match=r"a\.zip: needs"):
            pack(bundle.folder, tmp_path / "a.zip")


class TestUnpack:
    @pytest.mark.parametrize("top", ["", "any name/", "one/two/three/"])
    def test_an_archive_made_by_hand_will_do(self, bundle, tmp_path, top):
        files = {**contents(bundle.folder), "weights/.DS_Store": b"x", "notes.txt": b"y"}
        archive = zipped(tmp_path / "a.zip", files, top=top)
        found = contents(unpack(archive, tmp_path / "there"))
        assert found == contents(bundle.folder)
        assert left(tmp_path) == ["a.zip", "bundle", "there"]

    def test_an_empty_folder_is_filled_and_an_earlier_bundle_replaced(self, bundle, tmp_path):
        archive = pack(bundle.folder, tmp_path / "a.zip")
        (tmp_path / "empty").mkdir()
        assert contents(unpack(archive, tmp_path / "empty")) == contents(bundle.folder)
        other = make(tmp_path / "other", seed=9)
        assert contents(unpack(archive, other.folder)) == contents(bundle.folder)

    def test_any_other_folder_is_refused_and_stays(self, bundle, tmp_path):
        archive = pack(bundle.folder, tmp_path / "a.zip")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.txt").write_text("years")
        with pytest.raises(BundleError, match="mine: will not be replaced"):
            unpack(archive, tmp_path / "mine")
        assert contents(tmp_path / "mine") == {"thesis.txt": b"years"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"plans.json": None}, r"plans\.json: missing"),
            ({"weights/fold_0.safetensors": None}, r"fold_0\.safetensors: missing"),
            ({"weights/fold_0.safetensors": b"abc"}, r"fold_0\.safetensors: sha256 is"),
            ({"bundle.json": b"{"}, r"bundle\.json in the archive: not valid JSON"),
            ({"bundle.json": b"[" * 100_000}, r"bundle\.json in the archive: not valid JSON"),
            ({"bundle.json": b"{}"}, r"has no sha256"),
            ({"bundle.json": b'{"sha256": {"../a": "0"}, "kind": "chain"}'}, r"chain: got"),
            ({"bundle.json": None}, r"holds no bundle"),
        ],
    )
    def test_damage_leaves_nothing_behind(self, bundle, tmp_path, change, message):
        files = {**contents(bundle.folder), **change}
        files = {name: content for name, content in files.items() if content is not None}
        archive = zipped(tmp_path / "a.zip", files)
        with pytest.raises(BundleError, match=message):
            unpack(archive, tmp_path / "there")
        assert left(tmp_path) == ["a.zip", "bundle"]

    @pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "weights/../../evil"])
    def test_a_bundle_that_lists_files_elsewhere_is_refused(self, bundle, tmp_path, name):
        (tmp_path / "evil").write_text("evil")
        files = contents(bundle.folder)
        values = json.loads(files["bundle.json"])
        values["sha256"][name] = hashlib.sha256(b"evil").hexdigest()
        files["bundle.json"] = json.dumps(values).encode()
        with pytest.raises(BundleError, match="lies outside the bundle"):
            unpack(zipped(tmp_path / "a.zip", files), tmp_path / "there")
        assert left(tmp_path) == ["a.zip", "bundle", "evil"]

    def test_damage_in_a_stage_before_is_found(self, cascade, tmp_path):
        files = contents(cascade.folder)
        files["members/previous/weights/fold_1.safetensors"] = b"abc"
        with pytest.raises(BundleError, match=r"fold_1\.safetensors: sha256 is"):
            unpack(zipped(tmp_path / "a.zip", files), tmp_path / "there")
        assert not (tmp_path / "there").exists()

    def test_two_bundles_in_one_archive_are_refused(self, bundle, tmp_path):
        files = contents(bundle.folder)
        both = {f"{top}/{name}": content for top in "ab" for name, content in files.items()}
        with pytest.raises(BundleError, match=r"holds several bundles \(a, b\)"):
            unpack(zipped(tmp_path / "a.zip", both, top=""), tmp_path / "there")

    def test_a_file_that_is_no_archive_is_refused(self, tmp_path):
        (tmp_path / "a.zip").write_bytes(b"no archive at all" * 50)
        with pytest.raises(BundleError, match=r"a\.zip: not a whole zip archive"):
            unpack(tmp_path / "a.zip", tmp_path / "there")
        with pytest.raises(BundleError, match=r"nowhere\.zip"):
            unpack(tmp_path / "nowhere.zip", tmp_path / "there")
        assert left(tmp_path) == ["a.zip"]

    @pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "model/../../evil"])
    def test_paths_that_lead_out_are_refused(self, bundle, tmp_path, name):
        archive = pack(bundle.folder, tmp_path / "a.zip")
        with zipfile.ZipFile(archive, "a") as opened:
            opened.writestr(name, b"evil")
        with pytest.raises(BundleError, match="a path that leads out of it"):
            unpack(archive, tmp_path / "there")
        assert left(tmp_path) == ["a.zip", "bundle"]

    def test_a_link_is_refused(self, bundle, tmp_path):
        archive = pack(bundle.folder, tmp_path / "a.zip")
        entry = zipfile.ZipInfo("Dataset007_Liver__3d_fullres/link")
        entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        with zipfile.ZipFile(archive, "a") as opened:
            opened.writestr(entry, "/etc/passwd")
        with pytest.raises(BundleError, match="a link or a device"):
            unpack(archive, tmp_path / "there")

    def test_a_cut_archive_is_refused(self, bundle, tmp_path):
        archive = pack(bundle.folder, tmp_path / "a.zip")
        archive.write_bytes(archive.read_bytes()[:-200])
        with pytest.raises(BundleError, match="not a whole zip archive"):
            unpack(archive, tmp_path / "there")
        assert left(tmp_path) == ["a.zip", "bundle"]


class TestOpened:
    def test_a_folder_a_run_and_an_archive_are_opened(self, bundle, tmp_path):
        (tmp_path / "run").mkdir()
        bundle.folder.rename(tmp_path / "run/bundle")
        archive = pack(tmp_path / "run", tmp_path / "a.zip")
        manifest = tmp_path / "run/bundle/bundle.json"
        for model in (tmp_path / "run", tmp_path / "run/bundle", manifest):
            with opened_bundle(model) as folder:
                assert folder == tmp_path / "run/bundle"
        with opened_bundle(archive) as folder:
            assert contents(folder) == contents(tmp_path / "run/bundle")
            assert tmp_path not in folder.parents
        assert not folder.exists()
        assert left(tmp_path) == ["a.zip", "run"]

    def test_what_is_no_model_is_refused(self, tmp_path):
        with (
            pytest.raises(BundleError, match="nowhere: no such file or folder"),
            opened_bundle(tmp_path / "nowhere"),
        ):
            pass


class TestJoined:
    def real(self, folder, seed):
        """Write a bundle that can predict."""
        plans = make_plans("3d_fullres")
        network = build_network(
            plans.configuration("3d_fullres").architecture,
            num_inputs=1,
            num_logits=2,
            generator=torch.Generator().manual_seed(seed),
        )
        return write_bundle(
            folder,
            spec=DatasetSpec(name="a", channels=("CT",), labels={"background": 0, "liver": 1}),
            plans=plans,
            configuration="3d_fullres",
            weights={"fold_0": {"final": network.state_dict()}},
            semantics=Semantics(),
        )

    def test_an_ensemble_predicts_the_weighted_mean(self, tmp_path):
        bundle, other = (self.real(tmp_path / str(seed), seed) for seed in (3, 9))
        joined = join([bundle.folder, other.folder], tmp_path / "both", weights=[2, 1])
        image = np.random.default_rng(3).normal(40, 30, (1, 14, 20, 16)).astype(np.float32)
        case = (image, np.diag([0.9, 1.2, 2.0, 1.0]))
        options = {"probabilities": True, "tta": "none"}
        found = load(joined, device="cpu").predict(case, **options).probabilities
        both = load([bundle.folder, other.folder], device="cpu", weights=[2, 1])
        np.testing.assert_array_equal(found, both.predict(case, **options).probabilities)
        assert np.abs(found - load(bundle.folder, device="cpu").predict(case, **options)
                      .probabilities).max() > 1e-3  # fmt: skip

    def test_fewer_than_two_or_other_weights_are_refused(self, bundle, tmp_path):
        with pytest.raises(ConfigError, match="got 1 models and no weights"):
            join([bundle.folder], tmp_path / "one")
        with pytest.raises(ConfigError, match="got 2 models and 1 weights"):
            join([bundle.folder] * 2, tmp_path / "one", weights=[1])
        assert not (tmp_path / "one").exists()
