"""What commands print where a terminal is narrow or nobody reads, and what messages hide."""

import sys
import time

import pytest

from helpers.process import environment
from utils.errors import without_secrets

COMMAND = """
from utils.errors import command

@command
def main():
    for _ in range({lines}):
        print("\\N{{CJK UNIFIED IDEOGRAPH-732B}}", "x" * 99)
    return 0

raise SystemExit(main())
"""
LOG = """
from utils import log

log.open_streams()
log.info("\\N{CJK UNIFIED IDEOGRAPH-732B}")
"""


@pytest.mark.parametrize("code", [COMMAND.format(lines=1), LOG], ids=["command", "log"])
def test_a_terminal_that_lacks_a_character_ends_nothing(run, code):
    result = run([sys.executable, "-c", code], env=environment(PYTHONIOENCODING="latin-1"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("\\u732b")


def test_a_reader_that_goes_away_ends_a_command_in_silence(run):
    pipe = """set -o pipefail; "$0" -c "$1" | head -n 1 >/dev/null; echo "${PIPESTATUS[0]}" """
    result = run(["bash", "-c", pipe, sys.executable, COMMAND.format(lines=99999)])
    assert (result.stdout, result.stderr) == ("141\n", "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no address: a@b?c#d", "no address: a@b?c#d"),
        ("https://host/f.tar.gz", "https://host/f.tar.gz"),
        ("https://host:8080/a/@scope/f", "https://host:8080/a/@scope/f"),
        ("https://user:secret@host/f", "https://host/f"),
        ("HTTPS://user@host/f", "HTTPS://host/f"),
        ("HTTP://user:se@cret@host:80/f", "HTTP://host:80/f"),
        ("HTTP://user:se#cr?et@host/f", "HTTP://host/f"),
        ("https://host/f?X-Amz-Signature=secret", "https://host/f?..."),
        ("https://host?secret", "https://host?..."),
        ("https://host/f#secret", "https://host/f?..."),
        ("https://host/f?a=1&b='secret'(secret);secret,secret#secret", "https://host/f?..."),
        (
            "--data-url 'https://u:secret@a/f?secret' --data-url HTTP://b/?secret -c run?",
            "--data-url 'https://a/f?...' --data-url HTTP://b/?... -c run?",
        ),
        ('["https://a/?secret", "https://b/?secret"]', '["https://a/?...", "https://b/?..."]'),
        ("(HTTP://a/f?secret: answered 403; HTTP://u@b)", "(HTTP://a/f?...: answered 403; HTTP://b)"),
        ("https://user:se/cret@host/f", "https://host/f"),
        ("https://user:se\"<cret@host/f?\"secret", "https://host/f?..."),
        ("https://[::1]:80/@scope/f", "https://[::1]:80/@scope/f"),
        ("ftp://u:secret@a/f", "ftp://a/f"),
        ("https://a/?to=https://u:secret@b/?secret", "https://a/?...https://b/?..."),
        ("HTTP://a/f?", "HTTP://a/f?..."),
    ],
)  # fmt: skip
def test_an_address_is_shown_without_its_secrets(text, shown):
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown


def test_a_long_text_takes_no_long_time():
    begun = time.monotonic()
    for part in (
        "HTTP://",
        "HTTP://a?",
        "HTTP://a@",
        "HTTP://a?b;;",
        "?",
        "HTTP://a?" + 5000 * ";",
    ):
        without_secrets(part * (20_000 // len(part)) + "x")
    assert time.monotonic() - begun < 5
