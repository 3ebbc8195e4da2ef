"""Downloads against a server of this process that dies, forgets, lies and changes its files."""

from __future__ import annotations

import hashlib
import http.server
import logging
import re
import shutil
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from medseg.api import download as module
from medseg.api.download import download
from medseg.errors import BundleError, ConfigError, DatasetError

CONTENT = np.random.default_rng(3).bytes(3 * 2**20 + 12345)
OTHER = np.random.default_rng(4).bytes(len(CONTENT))
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
STATE = '{{"address": "{}", "validator": "{}", "size_bytes": {}}}'


@dataclass
class Site:
    """What the server does; a test changes it as it goes."""

    content: bytes = CONTENT
    etag: str | None = '"one"'
    modified: str | None = None
    knows_ranges: bool = True
    knows_length: bool = True
    sends_at_most: int | None = None
    """Bytes after which the connection is cut."""
    shifts: int = 0
    """How far from what was asked for a range begins."""
    status: int = 200
    redirect: str | None = None
    requests: list = field(default_factory=list)
    address: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's site says."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        site = self.server.site
        site.requests.append({name: self.headers[name] for name in ("Range", "If-Range")})
        if site.redirect or site.status != 200:
            self.send_response(302 if site.redirect else site.status)
            if site.redirect:
                self.send_header("Location", site.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = self._start(site)
        if start >= len(site.content) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(site.content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        end = f"bytes {start}-{len(site.content) - 1}/{len(site.content)}"
        fields = {
            "ETag": site.etag,
            "Last-Modified": site.modified,
            "Content-Range": end if start else None,
            "Content-Length": str(len(site.content) - start) if site.knows_length else None,
        }
        for name, value in fields.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(site.content[start:][: site.sends_at_most])
        self.close_connection = True

    def _start(self, site):
        """Return where to begin; a range whose file has changed is not looked at."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        guard = self.headers["If-Range"]
        if match is None or not site.knows_ranges:
            return 0
        if guard is not None and guard not in (site.etag, site.modified):
            return 0
        return int(match[1]) + site.shifts


@pytest.fixture
def site(monkeypatch):
    """A server; its address is not asked of a proxy."""
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.site = Site(address=f"http://127.0.0.1:{server.server_port}/files/a.zip?download=1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.site
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "downloads/a.zip"


def names(file):
    """Return what lies in the folder of downloads."""
    return sorted(path.name for path in file.parent.iterdir()) if file.parent.exists() else []


def interrupt(site, file, num_bytes=2**20 + 77, **options):
    """Begin a download whose connection is cut."""
    site.sends_at_most = num_bytes
    with pytest.raises(BundleError, match="the connection ended"):
        download(site.address, file, **options)
    site.sends_at_most = None
    assert file.with_name("a.zip.part").stat().st_size == num_bytes


DONE = ["a.zip", "a.zip.json"]


@pytest.mark.parametrize("checksum", ["", f"md5:{MD5}", f"sha256:{SHA256}"])
def test_a_file_comes_whole_and_is_recorded(site, file, checksum):
    record = download(site.address, file, checksum=checksum, size_bytes=len(CONTENT))
    assert file.read_bytes() == CONTENT
    assert (record.sha256, record.size_bytes) == (SHA256, len(CONTENT))
    assert record.compared_with == checksum
    assert names(file) == DONE


def test_what_is_there_is_verified_and_not_downloaded_again(site, file):
    first = download(site.address, file)
    assert download(site.address, file) == first
    assert len(site.requests) == 1
    known = download(site.address, file, checksum=f"md5:{MD5}")
    assert known.compared_with == f"md5:{MD5}"
    assert len(site.requests) == 1


def test_what_was_damaged_since_is_downloaded_again(site, file, caplog):
    download(site.address, file)
    file.write_bytes(CONTENT[:-1] + b"!")
    download(site.address, file)
    assert file.read_bytes() == CONTENT
    assert "damaged since it was downloaded" in caplog.text
    assert len(site.requests) == 2


@pytest.mark.parametrize("record", [None, "{", '{"address": "https://a.org/b", "sha256": "0"}'])
def test_a_file_that_is_not_on_record_is_not_trusted(site, file, record):
    file.parent.mkdir()
    file.write_bytes(OTHER)
    if record is not None:
        file.with_name("a.zip.json").write_text(record)
    download(site.address, file)
    assert file.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("etag", "modified", "guard"),
    [
        ('"one"', "Wed, 01 Jan 2020 00:00:00 GMT", '"one"'),
        ('W/"weak"', "Wed, 01 Jan 2020 00:00:00 GMT", "Wed, 01 Jan 2020 00:00:00 GMT"),
        (None, "Wed, 01 Jan 2020 00:00:00 GMT", "Wed, 01 Jan 2020 00:00:00 GMT"),
    ],
)
def test_an_interrupted_download_goes_on(site, file, etag, modified, guard):
    site.etag, site.modified = etag, modified
    interrupt(site, file, 2**20 + 77)
    assert names(file) == ["a.zip.part", "a.zip.part.json"]
    download(site.address, file)
    assert file.read_bytes() == CONTENT
    assert names(file) == DONE
    assert site.requests[1] == {"Range": f"bytes={2**20 + 77}-", "If-Range": guard}


def test_it_may_be_interrupted_again_and_again(site, file):
    interrupt(site, file, 1000)
    for have in (2000, 3000, 4000):
        site.sends_at_most = 1000
        with pytest.raises(BundleError, match=rf"after {have / 1000:g} kB of 3.16 MB\. What came"):
            download(site.address, file)
    site.sends_at_most = None
    assert download(site.address, file).sha256 == SHA256
    assert [one["Range"] for one in site.requests] == [
        None, "bytes=1000-", "bytes=2000-", "bytes=3000-", "bytes=4000-",
    ]  # fmt: skip


def test_a_server_that_ignores_ranges_is_asked_for_the_whole(site, file, caplog):
    caplog.set_level(logging.INFO)
    interrupt(site, file)
    site.knows_ranges = False
    assert download(site.address, file).sha256 == SHA256
    assert file.read_bytes() == CONTENT
    assert "from the start" in caplog.text


def test_a_file_that_changed_in_between_is_never_joined(site, file):
    interrupt(site, file)
    site.content, site.etag = OTHER, '"two"'
    download(site.address, file)
    assert file.read_bytes() == OTHER


def test_without_anything_to_tell_a_change_by_it_begins_again(site, file):
    site.etag = None
    interrupt(site, file)
    site.content = OTHER
    download(site.address, file)
    assert file.read_bytes() == OTHER
    assert [one["Range"] for one in site.requests] == [None, None]


def test_a_published_checksum_tells_a_change(site, file):
    site.etag = None
    interrupt(site, file, checksum=f"sha256:{SHA256}")
    assert download(site.address, file, checksum=f"sha256:{SHA256}").sha256 == SHA256
    assert site.requests[1] == {"Range": f"bytes={2**20 + 77}-", "If-Range": None}


def test_joined_halves_of_two_files_are_not_kept(site, file):
    site.etag = None
    interrupt(site, file, checksum=f"md5:{MD5}")
    site.content = OTHER
    with pytest.raises(BundleError, match=f"its md5 is [0-9a-f]{{32}}, expected {MD5}"):
        download(site.address, file, checksum=f"md5:{MD5}")
    assert names(file) == []


@pytest.mark.parametrize("shift", [-5, 7])
def test_a_range_that_begins_elsewhere_is_not_used(site, file, shift):
    interrupt(site, file)
    site.shifts = shift
    assert download(site.address, file).sha256 == SHA256
    assert [one["Range"] for one in site.requests] == [None, f"bytes={2**20 + 77}-", None]


def test_a_part_longer_than_the_file_begins_again(site, file):
    file.parent.mkdir()
    file.with_name("a.zip.part").write_bytes(OTHER + OTHER)
    state = file.with_name("a.zip.part.json")
    state.write_text(STATE.format(site.address, '\\"one\\"', "null"))
    assert download(site.address, file).sha256 == SHA256
    assert [one["Range"] for one in site.requests] == [f"bytes={2 * len(OTHER)}-", None]


def test_a_part_that_is_whole_is_only_verified(site, file):
    file.parent.mkdir()
    file.with_name("a.zip.part").write_bytes(CONTENT)
    state = file.with_name("a.zip.part.json")
    state.write_text(STATE.format(site.address, '\\"one\\"', len(CONTENT)))
    assert download(site.address, file, checksum=f"md5:{MD5}").sha256 == SHA256
    assert site.requests == []


@pytest.mark.parametrize("state", ["{", STATE.format("https://a.org/other.zip", "x", 9), None])
def test_a_part_of_something_else_begins_again(site, file, state):
    file.parent.mkdir()
    file.with_name("a.zip.part").write_bytes(OTHER[:5000])
    if state is not None:
        file.with_name("a.zip.part.json").write_text(state)
    assert download(site.address, file).sha256 == SHA256
    assert site.requests == [{"Range": None, "If-Range": None}]


def test_a_wrong_checksum_leaves_nothing(site, file):
    with pytest.raises(BundleError, match=f"its sha256 is {SHA256}, expected {'0' * 64}"):
        download(site.address, file, checksum=f"sha256:{'0' * 64}")
    assert names(file) == []


def test_another_size_than_published_is_refused_before_it_comes(site, file):
    with pytest.raises(BundleError, match=f"offers {len(CONTENT)} bytes, the catalogue says 5"):
        download(site.address, file, size_bytes=5)
    assert names(file) == []


def test_a_file_of_unknown_length_comes_whole(site, file):
    site.knows_length = False
    assert download(site.address, file).sha256 == SHA256


def test_a_file_that_was_replaced_is_pointed_out(site, file, caplog):
    download(site.address, file)
    file.unlink()
    site.content, site.etag = OTHER, '"two"'
    download(site.address, file)
    assert f"sha256 was {SHA256} when it was last downloaded" in caplog.text


@pytest.mark.parametrize(
    ("status", "advice"),
    [(404, "has moved or was withdrawn"), (403, "not public"), (503, "Try again later")],
)
def test_a_server_that_refuses_is_quoted(site, file, status, advice):
    site.status = status
    with pytest.raises(BundleError, match=rf"answered {status} \([\w ]+\)\. .*{advice}"):
        download(site.address, file)
    assert names(file) == []


def test_a_refusal_leaves_what_has_come(site, file):
    interrupt(site, file)
    site.status = 503
    with pytest.raises(BundleError, match="answered 503"):
        download(site.address, file)
    site.status = 200
    assert download(site.address, file).sha256 == SHA256
    assert site.requests[-1]["Range"] == f"bytes={2**20 + 77}-"


def test_an_empty_file_is_refused(site, file):
    site.content = b""
    with pytest.raises(BundleError, match="an empty file"):
        download(site.address, file)
    assert names(file) == []


def test_nobody_there_is_one_error(file):
    with pytest.raises(BundleError, match=r"cannot be reached \(.+\)\. Check the connection"):
        download("http://127.0.0.1:9/a.zip", file)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/b.zip", "ftp://127.0.0.1/b.zip"])
def test_no_one_is_sent_on_to_an_unsafe_address(site, file, address):
    site.redirect = address
    with pytest.raises(BundleError, match=re.escape(address)):
        download(site.address, file)
    assert names(file) == []


def test_a_safe_address_is_followed(site, file):
    """There is nobody at the new address, but that is where the answer comes from."""
    site.redirect = "https://127.0.0.1:9/b.zip"
    with pytest.raises(BundleError, match="cannot be reached"):
        download(site.address, file)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://a.org/b.zip", "a.zip"])
def test_only_http_is_spoken(file, address):
    with pytest.raises(ConfigError, match="expected an address that begins with https://"):
        download(address, file)


def test_a_disk_that_is_too_small_is_noticed_first(site, file, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr("medseg.io.space.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DatasetError, match=f"needs 3.16 MB \\({len(CONTENT)} bytes\\)"):
        download(site.address, file)
    assert "a.zip.part" not in names(file)


def test_a_full_disk_keeps_what_came(site, file, monkeypatch):
    written = []

    def copy(response, target, *arguments, **options):
        target.write(response.read(1000))
        written.append(1)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_copy", copy)
        with pytest.raises(BundleError, match=r"the disk is full\. What came is kept"):
            download(site.address, file)
    assert written == [1]
    assert download(site.address, file).sha256 == SHA256
    assert site.requests[1]["Range"] == "bytes=1000-"


def test_two_at_once_are_noticed(site, file, monkeypatch):
    copy = module._copy

    def twice(response, target, *arguments, **options):
        target.write(OTHER[:10])
        copy(response, target, *arguments, **options)

    monkeypatch.setattr(module, "_copy", twice)
    with pytest.raises(BundleError, match="Is another process downloading it"):
        download(site.address, file)
    assert names(file) == []


def test_progress_is_shown_in_megabytes(site, file, capsys):
    interrupt(site, file, 2_500_000, progress=True)
    capsys.readouterr()
    download(site.address, file, progress=True)
    shown = capsys.readouterr().err
    assert "a.zip: 100%" in shown
    assert "3/3" in shown
