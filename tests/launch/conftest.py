"""Fixtures of the launcher's tests."""

import os

import pytest

from utils.launch import cli


@pytest.fixture
def nothing_starts(monkeypatch):
    """Let the launcher fail where it would start something in the process of the test."""

    def forbidden(*what, **_):
        raise AssertionError(f"the launcher would start {what}")

    monkeypatch.setattr(cli, "supervise", forbidden)
    monkeypatch.setattr(cli, "_setup", forbidden)
    for name in ("execv", "execve"):
        monkeypatch.setattr(os, name, forbidden)
