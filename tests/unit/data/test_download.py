"""Downloads: whatever a server or a disk does, the right file or one line, in bounded time."""

import hashlib
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.process import environment
from helpers.process import run as run_command
from utils.data import download as download_module
from utils.data.datasets import load_dataset
from utils.errors import UserError
from utils.files import ROOT

NAME = "cifar-10-python.tar.gz"


class Server:
    """A real HTTP server on 127.0.0.1 whose answers a test chooses by path."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.requests: list[tuple[str, str | None]] = []
        self.passwords: list[str | None] = []
        self.stopped = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append((self.path, self.headers.get("Range")))
                server.passwords.append(self.headers.get("Authorization"))
                getattr(server, self.path.strip("/").split("/")[0])(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # of clients that leave
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler, content, status=200, length=None, **headers):
        handler.send_response(status)
        if length != "none":
            handler.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    def trickle(self, handler, content=b"x"):
        """Some bytes ten times a second, until the end of the test."""
        while not self.stopped.wait(0.1):
            handler.wfile.write(content)

    def good(self, handler):
        wanted = handler.headers.get("Range")
        if not wanted:
            self.answer(handler, self.content)
            return
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        size = len(self.content)
        rest = self.content[start:]
        if rest:
            span = f"bytes {start}-{size - 1}/{size}"
            self.answer(handler, rest, 206, Content_Range=span)
        else:
            self.answer(handler, b"", 416)

    def slow(self, handler):
        """Half of it at once, the rest a second later."""
        half = len(self.content) // 2
        self.answer(handler, self.content[:half], length=len(self.content))
        self.stopped.wait(1)
        handler.wfile.write(self.content[half:])

    def cut(self, handler):
        """Breaks off in the middle the first time."""
        if len(self.requests) == 1:
            half = self.content[: len(self.content) // 2]
            self.answer(handler, half, length=len(self.content))
        else:
            self.good(handler)

    def often_cut(self, handler):
        """Breaks off after each tenth."""
        start = int((handler.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        rest = self.content[start:]
        size = len(self.content)
        span = f"bytes {start}-{size - 1}/{size}"
        self.answer(handler, rest[: size // 10 + 1], 206, len(rest), Content_Range=span)

    def too_long(self, handler):
        """All of it, and the announcement of more."""
        self.answer(handler, self.content, length=len(self.content) + 1000)

    def too_short(self, handler):
        self.answer(handler, self.content, length=len(self.content) // 2)

    def no_length(self, handler):
        self.answer(handler, self.content, length="none")

    def nonsense_length(self, handler):
        self.answer(handler, self.content, length="many")

    def without_ranges(self, handler):
        self.answer(handler, self.content)

    def other_range(self, handler):
        """The first half, whatever range is asked for."""
        if handler.headers.get("Range"):
            half = self.content[: len(self.content) // 2]
            self.answer(handler, half, 206, Content_Range=f"bytes 0-{len(half) - 1}/*")
        else:
            self.answer(handler, self.content)

    def busy(self, handler):
        """503, twice."""
        if len(self.requests) < 3:
            self.answer(handler, b"later", 503)
        else:
            self.good(handler)

    def missing(self, handler):
        self.answer(handler, b"no", 404)

    def wrong(self, handler):
        self.answer(handler, b"x" * 1000)

    def huge(self, handler):
        self.answer(handler, b"", length=1 << 40)

    def loop(self, handler):
        self.answer(handler, b"", 302, Location=self.url + "/loop")

    def elsewhere(self, handler):
        """Leads to where a user and password must not be sent, even if that is the same server."""
        self.answer(handler, b"", 302, Location=self.url + "/good/file?token=SECRET")

    def protected(self, handler):
        """Wants "user" with "pass word" once, whose base64 this is."""
        if handler.headers.get("Authorization") == "Basic dXNlcjpwYXNzIHdvcmQ=":
            self.elsewhere(handler)
        else:
            self.answer(handler, b"", 401)

    def ftp(self, handler):
        self.answer(handler, b"", 302, Location="ftp://127.0.0.1/file")

    def endless(self, handler):
        self.answer(handler, b"", length="none")
        while not self.stopped.is_set():
            handler.wfile.write(bytes(1 << 16))

    def silent(self, handler):
        self.stopped.wait(20)

    def stalled(self, handler):
        self.answer(handler, self.content[:1], length=len(self.content))
        self.stopped.wait(20)

    def trickling_header(self, handler):
        handler.wfile.write(b"HTTP/1.0 200 ")
        self.trickle(handler)

    def trickling_body(self, handler):
        self.answer(handler, b"", length=len(self.content))
        self.trickle(handler)

    def trickling_chunk(self, handler):
        """A chunk whose length goes on for ever."""
        handler.protocol_version = "HTTP/1.1"
        self.answer(handler, b"", length="none", Transfer_Encoding="chunked")
        self.trickle(handler, b"0")

    def no_http(self, handler):
        handler.wfile.write(b"\x1b[2J hello\n\n")

    def control(self, handler):
        handler.send_response_only(404, "\x1b[2Jno\x07")
        handler.end_headers()


@pytest.fixture
def server(cifar10, monkeypatch):
    """A server of the small archive; the official address leads nowhere."""
    monkeypatch.setattr("utils.data.datasets.SERVER", "http://127.0.0.1:9/")
    monkeypatch.setattr(download_module, "TIMEOUT", 10.0)
    monkeypatch.setattr(download_module, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    started = Server(cifar10[0].read_bytes())
    yield started
    started.stop()


def fetch(server, cifar10, root, *paths):
    urls = [f"{server.url}/{path}" for path in paths]
    return load_dataset("cifar10", root, urls=urls, md5=cifar10[1])


def left_in(root):
    return sorted(path.name for path in root.iterdir() if path.name[0] != ".")


# --- servers -------------------------------------------------------------------------------------


def test_a_download_that_breaks_off_is_continued(server, cifar10, tmp_path):
    assert len(fetch(server, cifar10, tmp_path / "d", "cut/file").train_labels) == 100
    (_, first), (_, second) = server.requests
    assert first is None
    assert second == f"bytes={len(server.content) // 2}-"
    assert left_in(tmp_path / "d") == [NAME]


def test_as_often_as_it_brings_something(server, cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "_BLOCK", 1 << 10)
    fetch(server, cifar10, tmp_path / "d", "often_cut/file")
    assert len(server.requests) == 10


@pytest.mark.parametrize(
    "path", ["too_long", "no_length", "nonsense_length", "busy", "without_ranges", "other_range"]
)
@pytest.mark.parametrize("part", ["nothing", "begun", "of another file", "longer"])
def test_the_right_file_comes_of_it(server, cifar10, tmp_path, path, part):
    """Whatever an earlier run has left."""
    if part != "nothing":
        (tmp_path / "d").mkdir()
        left = {"begun": server.content[:9999], "of another file": b"<html>" * 999,
                "longer": bytes(len(server.content) + 1)}[part]  # fmt: skip
        (tmp_path / "d" / f"{NAME}.part").write_bytes(left)
    fetch(server, cifar10, tmp_path / "d", f"{path}/file")
    assert left_in(tmp_path / "d") == [NAME]
    assert (tmp_path / "d" / NAME).read_bytes() == server.content


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("too_short", "with md5"),
        ("wrong", hashlib.md5(b"x" * 1000).hexdigest()),
        ("missing", "answered 404 Not Found"),
        ("loop", "redirect"),
        ("ftp", "redirects from http to ftp"),
        ("huge", "announces 1,099,511,627,776 bytes"),
        ("endless", "sends more than 1,000,000 bytes"),
        ("silent", "silent for 0.5 seconds"),
        ("stalled", "silent for 0.5 seconds"),
        ("trickling_header", "silent for 0.5 seconds"),
        ("trickling_chunk", "silent for 0.5 seconds"),
        ("trickling_body", "bytes in 0.5 seconds"),
        ("no_http", r"\x1b[2J"),
        ("control", r"answered 404 \x1b[2Jno\x07"),
    ],
)
def test_what_a_server_does_wrong_is_said(
    server, cifar10, tmp_path, monkeypatch, capsys, path, said
):
    monkeypatch.setattr(download_module, "MAX_BYTES", 1_000_000)
    if "seconds" in said:
        monkeypatch.setattr(download_module, "TIMEOUT", 0.5)
    before = time.monotonic()
    with pytest.raises(UserError) as caught:
        fetch(server, cifar10, tmp_path / "d", f"{path}/file")
    assert time.monotonic() - before < 8, "three times half a second, and some"
    assert said in str(caught.value)
    lines = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in [str(caught.value), *lines])
    assert all(line.startswith(("downloading ", "warning: ")) for line in lines)
    kept = {f"{NAME}.part"} if "seconds" in said else set()
    assert kept.issuperset(left_in(tmp_path / "d"))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("user:SECRET@HOST/missing/file?SECRET#SECRET", "HOST/missing/file?..."),
        ("HOST/too_short/f?X-Amz-Signature=SECRET", "HOST/too_short/f?..."),
        ("HOST/ftp/file?SECRET", "HOST/ftp/file?..."),
        ("user:SECRET/SECRET@HOST/file", "HOST/file: not a valid address"),
        ("SECRET@HOST:port/file", "HOST:port/file: not a valid address"),
        ("user:SECRET@[HOST/file", "not a valid address"),
    ],
)
def test_no_secret_of_an_address_is_shown(server, cifar10, tmp_path, capsys, address, shown):
    scheme, host = server.url.split("//")
    url = f"{scheme}//{address.replace('HOST', host)}"
    with pytest.raises(UserError) as caught:
        load_dataset("cifar10", tmp_path / "d", urls=[url], md5=cifar10[1])
    said = str(caught.value) + capsys.readouterr().out
    assert shown.replace("HOST", host) in said
    assert "SECRET" not in said


def test_a_user_and_password_are_sent_to_the_address_alone(server, cifar10, tmp_path, capsys):
    scheme, host = server.url.split("//")
    url = f"{scheme}//user:pass%20word@{host}/protected/file?SECRET"
    load_dataset("cifar10", tmp_path / "d", urls=[url], md5=cifar10[1])
    assert [path for path, _ in server.requests] == [
        "/protected/file?SECRET",
        "/good/file?token=SECRET",
    ]
    assert server.passwords == ["Basic dXNlcjpwYXNzIHdvcmQ=", None]
    assert capsys.readouterr().out == f"downloading {server.url}/protected/file?...\n"


def test_the_next_mirror_is_tried(server, cifar10, tmp_path):
    fetch(server, cifar10, tmp_path / "d", "missing/file", "loop/file", "huge/file", "good/")
    assert [path for path, _ in server.requests][-1] == f"/good/{NAME}"


def test_what_one_mirror_began_does_not_spoil_the_next(server, cifar10, tmp_path):
    server.stalled = lambda handler: server.answer(handler, b"<html>", length=10_000)
    fetch(server, cifar10, tmp_path / "d", "stalled/file", "good/file")
    assert left_in(tmp_path / "d") == [NAME]


def test_a_part_that_is_complete_needs_no_server(cifar10, tmp_path, monkeypatch):
    """An earlier run was killed between the last byte and the renaming."""
    monkeypatch.setattr("utils.data.datasets.SERVER", "http://127.0.0.1:9/")
    (tmp_path / "d").mkdir()
    shutil.copy(cifar10[0], tmp_path / "d" / f"{NAME}.part")
    load_dataset("cifar10", tmp_path / "d", md5=cifar10[1])
    assert left_in(tmp_path / "d") == [NAME]


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
@pytest.mark.parametrize("scheme", ["https", "HTTPS"])
def test_a_redirect_from_https_to_http_is_not_followed(
    server, cifar10, tmp_path, monkeypatch, scheme
):
    certificate = tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    ).split()
    subprocess.run([*command, "-keyout", certificate, "-out", certificate.with_suffix(".crt")],
                   check=True, capture_output=True)  # fmt: skip
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.with_suffix(".crt"), certificate)
    secure = Server(server.content)
    secure.http.socket = context.wrap_socket(secure.http.socket, server_side=True)
    secure.down = lambda handler: secure.answer(handler, b"", 302, Location=server.url + "/good/f")
    secure.url = secure.url.replace("http", scheme)
    try:
        with pytest.raises(UserError, match="redirects from https to http:"):
            fetch(secure, cifar10, tmp_path / "d", "down/file")
        assert server.requests == []
        fetch(secure, cifar10, tmp_path / "d", "good/file")  # the certificate is not the reason
    finally:
        secure.stop()


def test_without_network_the_ways_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.datasets.SERVER", "http://127.0.0.1:9/")
    with pytest.raises(UserError) as caught:
        load_dataset("cifar10", tmp_path / "d")
    for way_out in ("--data-url", "--data-archive", "-d folder", "-d synthetic10"):
        assert way_out in str(caught.value)
    assert "\n" not in str(caught.value)


# --- processes and disks -------------------------------------------------------------------------

LOADER = """
import sys
from utils.data import datasets as data
data.SERVER = "http://127.0.0.1:9/"
found = data.load_dataset("cifar10", sys.argv[1], urls=[sys.argv[2]], md5=sys.argv[3])
print(len(found.train_labels))
"""


def start_loader(root, server, path, md5):
    command = [sys.executable, "-c", LOADER, str(root), f"{server.url}/{path}/file", md5]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(no_proxy="*"), stdout=subprocess.PIPE, text=True
    )


def script_command(root, server, path, md5, folder):
    """A short run of the real script on what the server has."""
    words = "--train-batch 64 --epochs 1 -a alexnet -d cifar10".split()
    url = f"{server.url}/{path}/file"
    places = ["--data", root, "--data-url", url, "--data-md5", md5, "-c", folder]
    return [ROOT / "cifar.py", *words, *places]


@pytest.mark.parametrize("cache", [pytest.param("usable", marks=pytest.mark.slow), "unusable"])
def test_four_processes_at_once_download_once(server, cifar10, tmp_path, cache):
    root = tmp_path / "d"
    if cache == "unusable":
        root.mkdir()
        (root / ".cache").write_text("a file, not a folder")
    processes = [start_loader(root, server, "slow", cifar10[1]) for _ in range(4)]
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.splitlines()[-1] == "100"
    assert len(server.requests) == 1


@pytest.mark.slow
def test_two_jobs_of_two_workers_download_once(server, cifar10, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    jobs = []
    for name in ("one", "two"):
        command = script_command(tmp_path / "d", server, "slow", cifar10[1], tmp_path / name)
        jobs.append(
            subprocess.Popen(
                [str(word) for word in [*launcher, *command]],
                cwd=ROOT, env=environment(no_proxy="*"), stdout=subprocess.DEVNULL,
            )
        )  # fmt: skip
    assert [job.wait(timeout=100) for job in jobs] == [0, 0]
    assert len(server.requests) == 1
    assert (tmp_path / "one" / "log.txt").read_text() == (tmp_path / "two" / "log.txt").read_text()


def test_kill_in_the_middle_leaves_a_part_that_the_next_run_completes(server, cifar10, tmp_path):
    root = tmp_path / "d"
    half = len(server.content) // 2

    def endless_pause(handler):
        server.answer(handler, server.content[:half], length=len(server.content))
        server.stopped.wait(60)

    server.slow = endless_pause
    process = start_loader(root, server, "slow", cifar10[1])
    part = root / f"{NAME}.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert left_in(root) == [part.name]
    fetch(server, cifar10, root, "good/file")
    assert left_in(root) == [NAME]
    assert server.requests[-1][1].startswith("bytes=")


def test_a_full_disk_is_said_and_what_came_is_used_later(server, cifar10, tmp_path):
    root, folder = tmp_path / "d", tmp_path / "run"
    command = script_command(root, server, "good", cifar10[1], folder)
    limited = ["bash", "-c", 'ulimit -f 100 && exec "$@"', "-", sys.executable]  # 100 KiB a file
    result = run_command([*limited, *command], env=environment(no_proxy="*"))
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {root / NAME}.part: cannot be written (File too large)")
    assert "--data" in line
    assert not folder.exists()
    assert left_in(root) == [f"{NAME}.part"]
    fetch(server, cifar10, root, "good/file")
    assert [span for _, span in server.requests] == [None, "bytes=102400-"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_full_file_system_is_said(server, cifar10, tmp_path):
    root = tmp_path / "small"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(root)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let root mount")
    try:
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            fetch(server, cifar10, root, "good/file")
        assert len(server.requests) == 1, "another attempt would not help"
    finally:
        subprocess.run(["umount", str(root)], check=True)


@pytest.mark.parametrize("name", [NAME, f"{NAME}.part"])
def test_a_folder_in_the_place_of_the_file_is_said(server, cifar10, tmp_path, name):
    (tmp_path / "d" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="Is a directory"):
        fetch(server, cifar10, tmp_path / "d", "good/file")
