"""The web interface: what is answered, what is refused, what is never told."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import time
import tracemalloc
import zipfile
from itertools import pairwise

import nibabel as nib
import pytest

from medseg.serve.limits import Limits
from tests.serve.conftest import CHANNELS, LABELS

BOUNDARY = "frontier"
HEAD = (
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.nii.gz"\r\n\r\n'
).encode()


def pieces(*parts, repeat=0):
    """Yield the messages of a request body, `repeat` times its last part."""
    for part in (*parts[:-1], *parts[-1:] * max(repeat, 1)):
        yield {"type": "http.request", "body": part, "more_body": True}


def call(app, messages, headers=(), pause=None):
    """Send a request straight into the application; return status, body and messages taken."""
    sent, taken = [], 0

    async def receive():
        nonlocal taken
        message = next(messages, None)
        if message is None:
            await asyncio.sleep(pause or 0)
            return {"type": "http.request", "body": b"", "more_body": pause is not None}
        taken += 1
        return message

    async def send(message):
        sent.append(message)

    kind = f"multipart/form-data; boundary={BOUNDARY}".encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/jobs",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", kind), *headers],
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], sent[1]["body"], taken


class TestWay:
    def test_upload_poll_download(self, serving, tmp_path):
        server = serving()
        answer = server.post_case()
        assert answer.status_code == 202
        posted = answer.json()
        assert answer.headers["location"] == posted["links"]["job"] == f"/v1/jobs/{posted['id']}"
        job = server.wait_for(posted["id"])
        assert (job["state"], job["place"], job["message"]) == ("done", None, "")
        assert job["created"] <= job["started"] <= job["finished"] < job["expires"]
        assert (job["volumes_ml"], job["flags"]) == ({"organ": 1.5}, ["nothing to see"])
        answer = server.client.get(job["links"]["segmentation"])
        assert answer.headers["content-type"] == "application/gzip"
        assert 'filename="segmentation.nii.gz"' in answer.headers["content-disposition"]
        (tmp_path / "s.nii.gz").write_bytes(answer.content)
        assert nib.load(tmp_path / "s.nii.gz").get_fdata().ravel().tolist() == [5, 6]

    def test_result_as_json(self, serving):
        server = serving()
        job = server.wait_for(server.post_case().json()["id"])
        result = server.client.get(job["links"]["result"]).json()
        assert result.pop("seconds") >= 0
        assert result == {
            "id": job["id"],
            "model": "Dataset999_Tiny",
            "labels": {**LABELS, "all": [1, 2]},
            "volumes_ml": {"organ": 1.5},
            "flags": ["nothing to see"],
            "shape": [2, 1, 1],
            "affine": [[0.7, 0, 0, 0], [0, 1.1, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 1.0]],
        }

    def test_only_the_result_stays_on_disk(self, serving):
        server = serving()
        job = server.wait_for(server.post_case().json()["id"])
        server.until(lambda: [path.name for path in server.files()] == ["segmentation.nii.gz"])
        size = server.files()[0].stat().st_size
        server.until(lambda: server.queue.disk.taken == size)
        assert server.client.delete(job["links"]["job"]).status_code == 204
        assert server.client.get(job["links"]["job"]).status_code == 404
        assert server.files() == []
        assert server.queue.disk.taken == 0

    def test_model_and_health(self, serving):
        server = serving(keep_seconds=90.0)
        model = server.client.get("/v1/model").json()
        assert (model["channels"], model["folds"]) == (list(CHANNELS), ["fold_0"])
        assert model["limits"]["max_upload_bytes"] == 4_000_000
        assert model["limits"]["keep_seconds"] == 90
        assert {".nii.gz", ".zip"} <= set(model["limits"]["endings"])
        assert server.client.get("/health").json() == {"status": "ok", "version": "9.9"}

    def test_health_tells_when_no_job_is_worked_off(self, serving):
        server = serving()
        server.queue.close(5)
        assert server.client.get("/health").status_code == 503

    def test_result_before_it_is_done(self, serving):
        server = serving()
        server.model.leave.clear()
        job = server.post_case().json()
        for link in ("segmentation", "result"):
            answer = server.client.get(job["links"][link])
            assert answer.status_code == 409
            assert "expected it to be done" in answer.json()["detail"]

    @pytest.mark.parametrize("name", ["x", "..%2f..%2fetc", "%00", "." * 3])
    def test_unknown_job(self, name, serving):
        client = serving().client
        for answer in (client.get(f"/v1/jobs/{name}"), client.delete(f"/v1/jobs/{name}")):
            assert answer.status_code == 404
            assert set(answer.json()) == {"detail"}


class TestChannels:
    @pytest.mark.parametrize(
        "fields", [("T1w", "CT"), ("CT", "T1w"), ("image", "image")], ids=" ".join
    )
    def test_order_comes_from_names_or_else_from_the_form(self, fields, serving):
        server = serving()
        marks = {"T1w": b"\x05", "CT": b"\x06"}
        contents = [marks.get(field, bytes([5 + n])) for n, field in enumerate(fields)]
        files = [(f, "x.nii", c) for f, c in zip(fields, contents, strict=True)]
        server.wait_for(server.post(*files).json()["id"])
        (case,) = server.model.cases
        assert [path.suffix for path in case] == [".nii", ".nii"]
        names = [path.name for path in case]
        assert names == sorted(names, reverse=fields[0] == "CT")

    def test_one_file_may_hold_all_channels(self, serving):
        server = serving()
        assert server.wait_for(server.post(("image", "x.nii", b"\x05")).json()["id"])["state"] == (
            "done"
        )

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            (["CT"], "the fields CT; expected a file in each of the fields T1w, CT"),
            (["CT", "CT"], "the fields CT, CT"),
            (["CT", "T1"], "a field 'T1'.*Did you mean 'T1w'"),
            (["T1w", "image"], "a field 'image'"),
            (["T1w", "CT", "CT"], "too many files; expected 2"),
            (["file", "file"], "a field 'file'"),
        ],
    )
    def test_unclear_channels_are_refused(self, fields, words, serving):
        server = serving()
        answer = server.post(*[(field, "x.nii", b"\x05") for field in fields])
        assert answer.status_code == 422
        assert re.search(words, answer.json()["detail"])
        assert server.files() == []

    def test_zip_per_channel(self, serving, zipped):
        server = serving()
        files = [
            (name, f"{name}.ZIP", zipped([("s/b", mark), ("s/a", b"z")]).read_bytes())
            for name, mark in (("CT", b"\x06"), ("T1w", b"\x05"))
        ]
        assert server.wait_for(server.post(*files).json()["id"])["state"] == "done"
        (case,) = server.model.cases
        assert server.files()[0].name == "segmentation.nii.gz"
        assert len(case) == 2

    def test_one_zip_with_a_folder_per_channel(self, serving, zipped, tmp_path):
        server = serving()
        packed = zipped([("p/ct/1", b"\x06"), ("p/T1W/1", b"\x05"), ("p/scout/1", b"\x09")])
        job = server.wait_for(server.post(("image", "p.zip", packed.read_bytes())).json()["id"])
        answer = server.client.get(job["links"]["segmentation"])
        (tmp_path / "s.nii.gz").write_bytes(answer.content)
        assert nib.load(tmp_path / "s.nii.gz").get_fdata().ravel().tolist() == [5, 6]

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            (["CT/1"], "no folder called T1w"),
            (["a", "b"], "no files that belong to a channel"),
            (["CT/T1w/1"], "no files that belong to a channel"),
            ([], "no files that belong to a channel"),
        ],
    )
    def test_zip_with_unclear_folders_is_refused(self, names, words, serving, zipped):
        server = serving()
        packed = zipped([(name, b"\x05") for name in names]).read_bytes()
        answer = server.post(("image", "p.zip", packed))
        assert answer.status_code == 422
        assert words in answer.json()["detail"]
        assert server.files() == []
        assert server.queue.disk.taken == 0


class TestUploads:
    @pytest.mark.parametrize(
        "name",
        [
            "../../evil.nii",
            "/etc/evil.nii",
            "..\\evil.nii",
            "a\0b.nii",
            "x" * 3000 + ".nii",
            "é.nii",
        ],
    )
    def test_names_of_the_client_are_not_used(self, name, serving, tmp_path):
        server = serving()
        server.model.leave.clear()
        body = (
            b"\r\n".join(
                f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; '
                f'filename="{name}"\r\n\r\n\x05'.encode()
                for field in CHANNELS
            )
            + f"\r\n--{BOUNDARY}--\r\n".encode()
        )
        status, answer, _ = call(server.app, pieces(body))
        assert status == 202, answer
        assert [p.name for p in server.files()] == ["image_0000.nii", "image_0001.nii"]
        assert not list(tmp_path.rglob("*evil*"))

    @pytest.mark.parametrize(
        "name", ["x.tif", "x.mhd", "x.nhdr", "x.hdr", "x.img", "x", "x.nii.exe", "x.zip/", "x.dcm"]
    )
    def test_endings_off_the_list_are_refused(self, name, serving):
        server = serving()
        answer = server.post(("image", name, b"x"))
        assert answer.status_code == 415
        assert ".nii.gz" in answer.json()["detail"]
        assert server.files() == []

    def test_fields_that_are_no_files_are_refused(self, serving):
        answer = serving().client.post(
            "/v1/jobs", data={"note": "hello"}, files={"image": ("x.nii", b"x")}
        )
        assert answer.status_code == 422
        assert "'note' is no file" in answer.json()["detail"]

    @pytest.mark.parametrize(
        ("kind", "body", "status"),
        [
            ("application/json", b"{}", 415),
            ("multipart/form-data", b"x", 415),
            ("multipart/form-data; boundary=b", b"no form at all", 400),
            ("multipart/form-data; boundary=b", b"", 400),
            ("multipart/form-data; boundary=b", b"--b--\r\n", 422),
            ("multipart/form-data; boundary=b", b"--b\r\nA: " + b"x" * 99_999, 400),
            (f"multipart/form-data; boundary={'b' * 999}", b"x", 400),
        ],
    )
    def test_bodies_that_are_no_form(self, kind, body, status, serving):
        server = serving()
        answer = server.client.post("/v1/jobs", content=body, headers={"Content-Type": kind})
        assert answer.status_code == status, answer.text
        assert server.files() == []
        assert server.post_case().status_code == 202

    def test_announced_size_is_refused_before_anything_is_read(self, serving):
        server = serving()
        status, body, taken = call(
            server.app, pieces(HEAD, b"x"), headers=[(b"content-length", b"4000001")]
        )
        assert (status, taken) == (413, 0)
        assert b"larger than 4 MB" in body

    def test_size_is_counted_while_streaming(self, serving):
        """Without an announced size, an endless body is cut off right behind the limit."""
        server = serving()
        block = bytes(100_000)
        status, _, taken = call(server.app, pieces(HEAD, block, repeat=10_000))
        assert status == 413
        assert taken == 1 + 40
        assert server.files() == []
        assert server.queue.disk.taken == 0

    def test_upload_that_stands_still_is_given_up(self, serving):
        server = serving(idle_seconds=0.2, max_waiting=1)
        start = time.monotonic()
        status, _, _ = call(server.app, pieces(HEAD, b"x"), pause=30)
        assert status == 408
        assert time.monotonic() - start < 10
        assert server.post_case().status_code == 202

    def test_upload_that_trickles_is_given_up(self, serving):
        server = serving(upload_seconds=0.3, idle_seconds=5)
        status, _, _ = call(server.app, pieces(HEAD), pause=0.05)
        assert status == 408

    def test_connection_that_breaks_leaves_nothing(self, serving):
        server = serving(max_waiting=1)
        messages = iter([*pieces(HEAD, b"x" * 2_000_000), {"type": "http.disconnect"}])
        assert call(server.app, messages)[0] == 400
        assert server.files() == []
        assert server.post_case().status_code == 202

    def test_upload_takes_no_memory(self, serving):
        server = serving(max_upload_bytes=100_000_000, max_disk_bytes=100_000_000)
        block = os.urandom(65_536)
        end = f"\r\n--{BOUNDARY}--\r\n".encode()
        messages = iter([*pieces(HEAD, block, repeat=600), *pieces(end)])
        tracemalloc.start()
        try:
            status, _, _ = call(server.app, messages)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert status == 202
        assert peak < 12_000_000

    def test_disk_budget(self, serving):
        server = serving(max_upload_bytes=1000, max_disk_bytes=1000)
        server.model.leave.clear()
        first = server.post(("image", "x.nii", b"\x05" * 600)).json()["id"]
        answer = server.post(("image", "x.nii", b"\x05" * 600))
        assert answer.status_code == 507
        assert "used up" in answer.json()["detail"]
        assert int(answer.headers["retry-after"]) > 0
        server.model.leave.set()
        server.wait_for(first)
        server.client.delete(f"/v1/jobs/{first}")
        assert server.post(("image", "x.nii", b"\x05" * 600)).status_code == 202


class TestImages:
    def test_image_that_promises_too_many_voxels(self, serving):
        """Two kilobytes that would unpack to gigabytes are refused by their header."""
        server = serving()
        header = nib.Nifti1Header()
        header.set_data_shape((3000, 3000, 300))
        packed = gzip.compress(header.binaryblock + bytes(2_000_000))
        assert len(packed) < 5000
        answer = server.post(("image", "x.nii.gz", packed))
        assert answer.status_code == 413
        assert "2700000000 voxels" in answer.json()["detail"]
        assert server.files() == []

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("x.nrrd", b"NRRD0004\ntype: short\nsizes: 2 2 2\ndata file: /etc/passwd\n\n"),
            ("x.nrrd", b"NRRD0004\ntype: short\nsizes: 2 2 2\nDataFile:/etc/passwd\n\n"),
            ("x.nrrd", b"NRRD0004\ntype: short\ndatafile: LIST\n/etc/passwd\n"),
            ("x.mha", b"ObjectType = Image\nDimSize = 2 2\nElementDataFile = /etc/passwd\n"),
            ("x.mha", b"DimSize = 2 2\nElementDataFile = LIST\n/etc/passwd\n"),
            ("x.mha", b"ElementDataFile:/etc/passwd\nElementDataFile = LOCAL\n"),
            ("x.mha", b"#" * 2_000_000 + b"\nElementDataFile = /etc/passwd\n"),
        ],
    )
    def test_headers_that_name_other_files_are_refused(self, name, content, serving):
        server = serving()
        answer = server.post(("image", name, content))
        assert answer.status_code == 422, answer.text
        assert "voxels are in the same file" in answer.json()["detail"]
        assert server.model.cases == []

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("x.nrrd", b"NRRD0004\ntype: short\nsizes: 90000 90000 2\n\n"),
            ("x.mha", b"DimSize = 90000 90000 2\nElementDataFile = LOCAL\n"),
        ],
    )
    def test_other_headers_that_promise_too_much(self, name, content, serving):
        assert serving().post(("image", name, content)).status_code == 413

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("x.nrrd", b"NRRD0004\ntype: short\nsizes: 2 2 2\n\n12345678"),
            ("x.mha", b"DimSize = 2 2 2\nElementDataFile = LOCAL\n12345678"),
            ("x.nii", b"garbage"),
            ("x.nii.gz", b"garbage"),
        ],
    )
    def test_others_are_left_to_the_reader(self, name, content, serving):
        assert serving().post(("image", name, content)).status_code == 202


class TestQueue:
    def test_jobs_run_in_order_one_at_a_time(self, serving):
        server = serving()
        server.model.leave.clear()
        ids = [server.post_case(bytes([5, n])).json()["id"] for n in range(1, 5)]
        server.wait_for(ids[0], "running")
        jobs = [server.job(job_id) for job_id in ids]
        assert [job["state"] for job in jobs] == ["running", "queued", "queued", "queued"]
        assert [job["place"] for job in jobs] == [None, 1, 2, 3]
        server.model.leave.set()
        ended = [server.wait_for(job_id) for job_id in ids]
        for before, after in pairwise(ended):
            assert before["finished"] <= after["started"]

    def test_full_queue(self, serving):
        server = serving(max_waiting=2)
        server.model.leave.clear()
        running = server.post_case().json()["id"]
        server.wait_for(running, "running")
        for _ in range(2):
            assert server.post_case().status_code == 202
        answer = server.post_case()
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert "2 jobs are waiting" in answer.json()["detail"]

    def test_uploads_hold_their_place(self, serving):
        """Refused before the body is read: nobody uploads gigabytes for a 429."""
        server = serving(max_waiting=1)
        slot = server.queue.reserve()
        assert call(server.app, pieces(HEAD, b"x"))[::2] == (429, 0)
        server.queue.release(slot)
        assert server.post_case().status_code == 202

    def test_cancelled_while_waiting(self, serving):
        server = serving()
        server.model.leave.clear()
        first, second = (server.post_case().json()["id"] for _ in range(2))
        server.wait_for(first, "running")
        answer = server.client.delete(f"/v1/jobs/{second}")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
        assert not [path for path in server.files() if second in str(path)]
        server.model.leave.set()
        server.wait_for(first)
        assert server.job(second)["state"] == "cancelled"
        assert len(server.model.cases) == 1
        assert server.client.delete(f"/v1/jobs/{second}").status_code == 204
        assert server.client.get(f"/v1/jobs/{second}").status_code == 404

    def test_cancelled_while_running(self, serving):
        """Its result is dropped, and the next job runs."""
        server = serving()
        server.model.leave.clear()
        first, second = (server.post_case().json()["id"] for _ in range(2))
        server.wait_for(first, "running")
        assert server.client.delete(f"/v1/jobs/{first}").json()["state"] == "cancelled"
        server.model.leave.set()
        assert server.wait_for(second)["state"] == "done"
        assert server.job(first)["state"] == "cancelled"
        assert not [path for path in server.files() if first in str(path)]
        assert server.client.get(f"/v1/jobs/{first}/segmentation").status_code == 409

    def test_results_are_kept_for_a_while_only(self, serving):
        server = serving(keep_seconds=0.6)
        job = server.wait_for(server.post_case().json()["id"])
        assert server.client.get(job["links"]["segmentation"]).status_code == 200
        server.until(lambda: server.client.get(job["links"]["job"]).status_code == 404)
        server.until(lambda: server.files() == [])
        server.until(lambda: server.queue.disk.taken == 0)

    def test_jobs_forgotten_at_once_do_not_stop_the_queue(self, serving):
        server = serving(keep_seconds=0.001)
        for _ in range(20):
            job = server.post_case().json()
            server.client.delete(job["links"]["job"])
            server.client.delete(job["links"]["job"])
        server.until(lambda: server.client.get("/health").status_code == 200)
        server.until(lambda: server.files() == [] and server.queue.disk.taken == 0)
        assert server.queue.is_alive

    def test_place_that_cannot_be_stored_is_given_back(self, serving):
        server = serving(max_waiting=1)
        moved = server.folder.rename(server.folder.with_name("away"))
        assert server.post_case().status_code == 507
        moved.rename(server.folder)
        assert server.post_case().status_code == 202

    def test_the_oldest_are_forgotten_for_the_newest(self, serving):
        server = serving(max_ended=2, keep_seconds=1000.0)
        ids = [server.post_case().json()["id"] for _ in range(4)]
        server.wait_for(ids[-1])
        server.post_case()
        server.until(lambda: server.client.get(f"/v1/jobs/{ids[1]}").status_code == 404)
        assert server.job(ids[-1])["state"] == "done"

    def test_ids_cannot_be_guessed(self, serving):
        server = serving(max_waiting=50)
        ids = {server.post_case().json()["id"] for _ in range(20)}
        assert len(ids) == 20
        assert all(len(job_id) == 32 for job_id in ids)


class TestWords:
    def test_bad_image_fails_its_job_in_words(self, serving):
        server = serving()
        job = server.wait_for(server.post_case(b"\x05\x00").json()["id"])
        assert job["state"] == "failed"
        assert job["message"] == (
            "channel 'CT': begins with a zero. Copy it again; see channel 'T1w'."
        )
        assert job["volumes_ml"] is None
        answer = server.client.get(job["links"]["result"])
        assert (answer.status_code, job["message"] in answer.json()["detail"]) == (409, True)
        server.until(lambda: server.files() == [])

    def test_mistakes_of_the_server_tell_nothing_of_it(self, serving, caplog):
        server = serving()
        job = server.wait_for(server.post_case(b"\xff\x05").json()["id"])
        assert job["state"] == "failed"
        assert "RuntimeError" in job["message"]
        assert "secret" not in job["message"]
        assert str(server.folder) not in job["message"]
        assert "a secret in" in caplog.text
        assert server.wait_for(server.post_case().json()["id"])["state"] == "done"

    def test_full_disk_while_uploading(self, serving, monkeypatch):
        server = serving(max_waiting=1)

        def full(*_, **__):
            raise OSError(28, "No space left on device", str(server.folder))

        monkeypatch.setattr("medseg.serve.receive.case_of", full)
        answer = server.post_case()
        assert answer.status_code == 507
        assert str(server.folder) not in answer.text
        assert server.files() == []

    def test_error_within_the_application(self, serving, monkeypatch):
        server = serving()
        server.client = type(server.client)(
            server.app, base_url="http://127.0.0.1", raise_server_exceptions=False
        )

        def broken(*_):
            raise KeyError(str(server.folder))

        monkeypatch.setattr("medseg.serve.app._view", broken)
        answer = server.post_case()
        assert answer.status_code == 500
        assert answer.json() == {"detail": "the server made a mistake; its log says more."}


class TestToken:
    TOKEN = "0123456789abcdef-token"

    def test_without_it_nothing_is_told(self, serving):
        server = serving(token=self.TOKEN)
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": self.TOKEN}):
            for answer in (
                server.client.get("/v1/model", headers=given),
                server.client.get("/v1/jobs/x", headers=given),
                server.client.delete("/v1/jobs/x", headers=given),
                server.post_case(headers=given),
            ):
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
        assert server.files() == []
        assert server.client.get("/health").status_code == 200

    def test_with_it_all_is_as_usual(self, serving):
        server = serving(token=self.TOKEN)
        server.client.headers["Authorization"] = f"Bearer {self.TOKEN}"
        assert server.wait_for(server.post_case().json()["id"])["state"] == "done"

    def test_body_is_not_read_without_it(self, serving):
        server = serving(token=self.TOKEN)
        assert call(server.app, pieces(HEAD, b"x"))[::2] == (401, 0)


def test_other_host_names_are_refused_on_a_local_server(serving):
    """A web page whose name was resolved anew to this machine cannot talk to the server."""
    client = serving().client
    assert client.get("/health", headers={"Host": "evil.example:80"}).status_code == 400
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert client.get("/health", headers={"Host": host}).status_code == 200


class TestDescription:
    def test_every_route_has_a_real_model(self, serving):
        server = serving()
        description = server.client.get("/openapi.json").json()
        found = {
            (method.upper(), path): {
                status: next(iter(answer.get("content", {"": {}}).values()))
                for status, answer in operation["responses"].items()
            }
            for path, operations in description["paths"].items()
            for method, operation in operations.items()
        }

        def model(route, status):
            return found[route][status]["schema"].get("$ref", "").rpartition("/")[2]

        job = "/v1/jobs/{job_id}"
        assert set(found) == {
            ("GET", "/health"), ("GET", "/v1/model"), ("POST", "/v1/jobs"), ("GET", job),
            ("DELETE", job), ("GET", f"{job}/result"), ("GET", f"{job}/segmentation"),
        }  # fmt: skip
        assert model(("POST", "/v1/jobs"), "202") == "JobView"
        assert model(("GET", job), "200") == model(("DELETE", job), "200") == "JobView"
        assert model(("GET", f"{job}/result"), "200") == "ResultView"
        assert model(("GET", "/v1/model"), "200") == "ModelView"
        assert model(("GET", "/health"), "200") == "Health"
        for answers in found.values():
            assert all(
                answer["schema"]["$ref"].endswith("/Problem")
                for status, answer in answers.items() if status[0] in "45"
            )  # fmt: skip

    def test_it_describes_the_form_and_the_token(self, serving):
        description = serving().client.get("/openapi.json").json()
        post = description["paths"]["/v1/jobs"]["post"]
        form = post["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert form["properties"]["image"]["items"]["format"] == "binary"
        assert {"202", "413", "415", "422", "429", "507"} <= set(post["responses"])
        assert post["security"] == [{"HTTPBearer": []}]
        state = description["components"]["schemas"]["JobView"]["properties"]["state"]
        assert state["enum"] == ["queued", "running", "done", "failed", "cancelled"]
        assert state["description"] == "Where the job stands."

    def test_no_page_loads_scripts_from_elsewhere(self, serving):
        client = serving().client
        assert [client.get(path).status_code for path in ("/docs", "/redoc", "/")] == [404] * 3


def test_zip_slip_leaves_no_file_outside(serving, zipped, tmp_path):
    server = serving()
    before = set(tmp_path.rglob("*"))
    link = zipfile.ZipInfo("door")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    for entries in ([("../slip", b"x")], [("/slip", b"x")], [(link, b".."), ("door/slip", b"x")]):
        packed = zipped([("CT/1", b"x"), *entries], name="bad.zip")
        before.add(packed)
        answer = server.post(("image", "x.zip", packed.read_bytes()))
        assert answer.status_code == 422
        assert "the zip archive holds" in answer.json()["detail"]
        assert set(tmp_path.rglob("*")) == before
    assert server.model.cases == []


def test_limits_that_serve_nothing_are_refused():
    with pytest.raises(ValueError, match=r"max-disk is 1 kB, less than the 2 GB of one upload"):
        Limits(max_disk_bytes=1000)
    with pytest.raises(ValueError, match="max-waiting is 0; expected more than 0"):
        Limits(max_waiting=0)
