"""A download of one file over HTTP after which it is either complete and right, or not there.

The file grows under a temporary ``.part`` name, is continued after an interruption, checked
against its md5 and only then renamed. An address may hold a password or a signature, so messages
show it by ``without_secrets``.
"""

import base64
import errno
import hashlib
import math
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import Any

from progress.bar import Bar

from utils import log
from utils.errors import UserError, one_line, reason_of, without_secrets

# Seconds without news from the server.
TIMEOUT = 30.0
# Bytes per second over that time.
MIN_RATE = 1 << 12
# Connections in a row that bring nothing new.
ATTEMPTS = 3
# Seconds before the second attempt; the third waits twice as long.
PAUSE = 0.5
# An official archive has 170 MB.
MAX_BYTES = 1 << 29
_BLOCK = 1 << 18


class _WrongFile(Exception):
    """The server sends something else than the file, so another attempt is not worth it."""


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirects (urllib bounds their number), but never from https to anything else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str):  # type: ignore[no-untyped-def]
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if urllib.parse.urlsplit(newurl).scheme not in allowed:
            raise _WrongFile(f"redirects from {req.type} to {without_secrets(newurl)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def md5_of(path: Path) -> str:
    """Return the md5 digest of a file in hex."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def download(urls: Sequence[str], path: Path, md5: str) -> None:
    """Fetch a file from the first address that has it.

    One process at a time may do so; the caller holds a lock.

    Args:
        urls: Addresses of the same file, tried in order.
        path: The file's final name; ``<path>.part`` holds what has arrived.
        md5: The hex digest that the file must have.

    Raises:
        UserError: No address gave the file; the message says what each did, and the ways out. Or
            there is no room for it.
    """
    part = path.with_name(path.name + ".part")
    failures = []
    for url in urls:
        log.info(one_line(f"downloading {without_secrets(url)}"))
        try:
            _fetch(url, part, md5)
            os.replace(part, path)
            return
        except (OSError, HTTPException, ValueError, _WrongFile) as error:
            if _is_disk_error(error):
                raise UserError(
                    f"{part}: cannot be written ({_reason(error)}); make room there and start "
                    "again, or name another folder with --data"
                ) from error
            failures.append(f"{without_secrets(url)}: {_reason(error)}")
            log.warning(one_line(failures[-1]))
    raise UserError(
        f"no download of {path.name} ({'; '.join(failures)}): name a mirror with --data-url URL, "
        "a file with --data-archive FILE, images with -d folder, or try -d synthetic10"
    )


def _is_disk_error(error: Exception) -> bool:
    """Return whether the file, and not the connection, fails, so that no address would help."""
    if not isinstance(error, OSError) or isinstance(error, urllib.error.URLError):
        return False
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return error.errno in full or error.filename is not None


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"answered {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return _reason(error.reason) if isinstance(error.reason, OSError) else str(error.reason)
    if isinstance(error, (InvalidURL, ValueError)):
        return "not a valid address"  # Their own words repeat parts of it, a password perhaps.
    return reason_of(error)


def _fetch(url: str, part: Path, md5: str) -> None:
    """Make ``part`` the whole file, with several connections if they break off."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise _WrongFile("not an http or https address")
    fresh = not part.exists()  # An earlier run or another address may have left something.
    farthest = fruitless = 0
    while not part.exists() or md5_of(part) != md5:
        try:
            _fetch_once(url, part)
            found, size = md5_of(part), part.stat().st_size
            if found == md5:
                return
            part.unlink()
            if fresh:
                raise _WrongFile(f"sent a file of {size:,} bytes with md5 {found}, not {md5}")
            raise OSError("continues another file than the one that was begun; starting over")
        except (OSError, HTTPException) as error:
            size = part.stat().st_size if part.exists() else 0
            if not (fresh or size):  # What was left was of no use and is gone.
                fresh, farthest, fruitless = True, 0, 0
            fruitless = 1 if size >= farthest + _BLOCK else fruitless + 1
            farthest = max(farthest, size)
            if fruitless == ATTEMPTS or not _is_transient(error):
                raise
            log.warning(one_line(f"{without_secrets(url)}: {_reason(error)}; trying again"))
            time.sleep(PAUSE * fruitless)


def _is_transient(error: Exception) -> bool:
    """Return whether the same request may bring more a moment later."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 416, 429)
    return not (_is_disk_error(error) or isinstance(error, InvalidURL))


def _fetch_once(url: str, part: Path) -> None:
    """Append to ``part`` what one connection brings, or write it anew."""
    have = part.stat().st_size if part.exists() else 0
    request = _request_for(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
    answer = _ask(request)
    try:
        status, content_range, length = next(answer)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # The server has no more than what is here, which is not the file.
            part.unlink(missing_ok=True)
        raise
    if status == 206 and not content_range.startswith(f"bytes {have}-"):
        part.unlink(missing_ok=True)
        raise OSError("answers with another range than it was asked for")
    if status != 206:
        have = 0  # A server that ignores the range sends everything again.
    total = None if length is None else have + length
    if total is not None and total > MAX_BYTES:
        raise _WrongFile(f"announces {total:,} bytes, more than any CIFAR archive has")
    with part.open("ab" if have else "wb") as file:
        have = _copy(answer, file, have, total)
        file.flush()
        os.fsync(file.fileno())
    if have > MAX_BYTES:
        part.unlink()
        raise _WrongFile(f"sends more than {MAX_BYTES:,} bytes")
    if total is not None and have < total:
        raise OSError(f"connection broke off after {have:,} of {total:,} bytes")


def _request_for(url: str) -> urllib.request.Request:
    """Return the request for an address; a user and password in it become a header.

    The header goes to this server alone and not to where it redirects.
    """
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if at:
        url = parts._replace(netloc=host).geturl()
    request = urllib.request.Request(url, headers={"User-Agent": "cifar-allreduce"})
    if at:
        encoded = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request


def _ask(request: urllib.request.Request) -> Iterator[Any]:
    """Yield status, Content-Range and length of the answer, then its content in blocks.

    A thread of its own talks to the server. So TIMEOUT bounds the wait for each of these however
    the server stalls: the timeout of a socket starts again with every byte, also inside a header.

    Raises:
        OSError: The server cannot be reached, is silent or breaks off.
        HTTPException: The server does not speak HTTP.
        _WrongFile: The server redirects to where it must not.
    """
    arrived: queue.Queue[Any] = queue.Queue(maxsize=4)

    def talk() -> None:
        with suppress(queue.Full):  # Nobody listens any more.
            for item in _answer(request):
                arrived.put(item, timeout=2 * TIMEOUT)

    threading.Thread(target=talk, daemon=True).start()
    while True:
        try:
            item = arrived.get(timeout=TIMEOUT)
        except queue.Empty:
            raise TimeoutError(f"silent for {TIMEOUT:g} seconds") from None
        if isinstance(item, Exception):
            raise item
        if item is None:
            return
        yield item


def _answer(request: urllib.request.Request) -> Iterator[Any]:
    """Yield what ``_ask`` yields, and at the end an exception, or None."""
    try:
        opener = urllib.request.build_opener(_NoDowngrade)
        # The listener gives up first; this timeout ends the thread that it leaves behind.
        with opener.open(request, timeout=2 * TIMEOUT) as response:
            yield response.status, response.headers.get("Content-Range", ""), response.length
            left = math.inf if response.length is None else response.length
            while left > 0 and (block := response.read1(_BLOCK)):
                left -= len(block)
                yield block
    except Exception as error:
        yield error
    yield None


def _copy(blocks: Iterable[bytes], file: Any, have: int, total: int | None) -> int:
    """Append blocks to the file, to MAX_BYTES at most; return how many bytes are now there."""
    draws = log.draws_progress()
    bar = Bar("download", max=total or MAX_BYTES, file=sys.stdout, suffix="%(percent)d %%")
    before, since = have, time.monotonic()
    for block in blocks:
        file.write(block)
        have += len(block)
        if have > MAX_BYTES:
            break
        if time.monotonic() - since > TIMEOUT:
            if have - before < MIN_RATE * TIMEOUT:
                raise TimeoutError(f"only {have - before:,} bytes in {TIMEOUT:g} seconds")
            before, since = have, time.monotonic()
        if draws:
            bar.goto(have)
    if draws:
        bar.finish()
    return have
