"""Fetching one file over HTTP so that it is either complete and right, or not there.

The file grows under a temporary ``.part`` name, is continued after an interruption, checked
against its md5 and only then renamed.
"""

import hashlib
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from progress.bar import Bar

from utils.errors import UserError

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 3  # connections to one address, each going on where the last one broke off
MOST_BYTES = 1 << 30  # no CIFAR archive comes near
_BLOCK = 1 << 18

Notify = Callable[[str], Any]


class _WrongFile(Exception):
    """The server sent something else than the file: not worth another attempt."""


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirects (urllib bounds their number), but never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str):  # type: ignore[no-untyped-def]
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise _WrongFile(f"redirects from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def md5_of(path: Path) -> str:
    """The md5 digest of a file, in hex."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def download(urls: Sequence[str], path: Path, md5: str, notify: Notify) -> None:
    """Bring a file from the first address that has it.

    Args:
        urls: addresses of the same file, tried in order.
        path: the file's final name; ``<path>.part`` holds what has arrived.
        md5: hex digest that the file must have.
        notify: gets a line about each address that fails.

    Raises:
        UserError: no address gave the file; says what each did, and the ways out.
    """
    part = path.with_name(path.name + ".part")
    failures = []
    for url in urls:
        notify(f"downloading {url}")
        try:
            _fetch(url, part, notify)
            found = md5_of(part)
            if found != md5:
                part.unlink()
                raise _WrongFile(f"sent a file with md5 {found} instead of {md5}")
        except (OSError, HTTPException, ValueError, _WrongFile) as error:
            failures.append(f"{url}: {_reason(error)}")
            notify(f"warning: {failures[-1]}")
            continue
        os.replace(part, path)
        return
    raise UserError(
        f"no download of {path.name} ({'; '.join(failures)}): name a mirror with --data-url URL, "
        "a file with --data-archive FILE, images with -d folder, or try -d synthetic10"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"answered {error.code} {error.reason}".replace("\n", " ")
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def _fetch(url: str, part: Path, notify: Notify) -> None:
    """Make ``part`` complete, with several connections if they break off."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise _WrongFile("not an http or https address")
    for attempt in range(1, ATTEMPTS + 1):
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_once(url, part, notify)
            return
        except (urllib.error.URLError, _WrongFile, OSError, HTTPException) as error:
            permanent = isinstance(error, _WrongFile) or (
                isinstance(error, urllib.error.HTTPError) and error.code < 500
            )
            progressed = part.exists() and part.stat().st_size > before
            if permanent or (attempt == ATTEMPTS and not progressed):
                raise
            if attempt == ATTEMPTS:
                raise
            notify(f"warning: {url}: {_reason(error)}; trying again")
            time.sleep(0.5 * attempt)


def _fetch_once(url: str, part: Path, notify: Notify) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "cifar-allreduce"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    opener = urllib.request.build_opener(_NoDowngrade)
    try:
        response = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing beyond what is here: complete, or another file
            return
        raise
    with response:
        # A server that ignores the range sends everything again.
        continued = response.status == 206 and f"bytes {have}-" in (
            response.headers.get("Content-Range") or ""
        )
        have = have if continued else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        if total is not None and total > MOST_BYTES:
            raise _WrongFile(f"announces {total:,} bytes, more than any CIFAR archive has")
        with part.open("ab" if continued else "wb") as file:
            have = _copy(response, file, have, total, notify)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and have < total:
        raise OSError(f"connection broke off after {have:,} of {total:,} bytes")


def _copy(response: Any, file: Any, have: int, total: int | None, notify: Notify) -> int:
    """Append the answer to the file; returns the bytes that are now there."""
    on_terminal = notify is print and sys.stdout.isatty()
    bar = Bar("download", max=total or have, file=sys.stdout, suffix="%(percent)d %%")
    while block := response.read(_BLOCK):
        have += len(block)
        if have > MOST_BYTES:
            raise _WrongFile(f"sends more than {MOST_BYTES:,} bytes")
        file.write(block)
        if on_terminal:
            bar.max = max(bar.max, have)
            bar.goto(have)
    if on_terminal:
        bar.finish()
    return have
