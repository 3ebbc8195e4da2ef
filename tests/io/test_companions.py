"""Which files belong to an image file."""

from medseg.io.companions import companions


def test_voxels_and_spacings_that_belong_to_a_file(tmp_path):
    for name in (
        "a.hdr",
        "a.img",
        "b.raw",
        "c_0001.tif",
        "c.json",
        "d.nii.gz",
        "d.json",
        "e.zraw",
    ):
        (tmp_path / name).touch()
    (tmp_path / "b.mhd").write_bytes(b"ObjectType = Image\nElementDataFile = b.raw\n")
    (tmp_path / "l.mha").write_bytes(b"ElementDataFile = LOCAL\n" + bytes(9))
    (tmp_path / "e.nhdr").write_bytes(b"NRRD0004\ndata file: ./e.zraw\n")
    found = {
        name: [path.name for path in companions(tmp_path / name)]
        for name in ("a.hdr", "a.img", "b.mhd", "c_0001.tif", "d.nii.gz", "e.nhdr", "l.mha")
    }
    assert found == {
        "a.hdr": ["a.img"],
        "a.img": ["a.hdr"],
        "b.mhd": ["b.raw"],
        "c_0001.tif": ["c.json"],
        "d.nii.gz": [],
        "e.nhdr": ["e.zraw"],
        "l.mha": [],
    }


def test_names_in_other_scripts(tmp_path):
    (tmp_path / "h\u00fcfte.raw").touch()
    text = "ObjectType = Image\r\nElementDataFile = h\u00fcfte.raw\r\n"
    (tmp_path / "a.mhd").write_bytes(text.encode())
    assert companions(tmp_path / "a.mhd") == [tmp_path / "h\u00fcfte.raw"]
