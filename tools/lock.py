"""requirements.lock: everything that the requirements bring, each package with its digest.

    python -m tools.lock            resolves anew and writes the file
    pip install --require-hashes -r requirements.lock

The file is for the kind of machine that it was made on: pip installs nothing from it that has
another digest, wherever it came from.
"""

import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from utils.files import ROOT

LOCK = ROOT / "requirements.lock"
FILES = ("--requirement=requirements.txt", "--requirement=requirements-dev.txt")


def resolve() -> list[dict[str, Any]]:
    """What pip would install into an empty environment, as its report lists it.

    Raises:
        subprocess.CalledProcessError: pip finds no set of versions that fits; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--dry-run", "--ignore-installed", f"--report={report}", *FILES,
            "--constraint=constraints.txt",
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(report.read_text())["install"]


def digest(download: dict[str, Any]) -> str:
    """The sha256 of a package's file: the index's, else that of the file where it is on disk."""
    known = download["archive_info"].get("hashes", {}).get("sha256")
    if known:
        return known
    address = urllib.parse.urlsplit(download["url"])
    if address.scheme != "file":
        raise SystemExit(f"error: {Path(address.path).name}: the index gives no sha256 of it")
    path = Path(urllib.request.url2pathname(address.path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lock(packages: list[dict[str, Any]]) -> str:
    """The text of the file."""
    version = ".".join(platform.python_version_tuple()[:2])
    kind = f"{platform.system()} {platform.machine()}, {platform.python_implementation()} {version}"
    lines = [
        "# Everything that requirements.txt and requirements-dev.txt bring, each with its",
        f"# digest, for {kind}; made by python -m tools.lock.",
        "# pip install --require-hashes -r requirements.lock installs this and nothing else.",
    ]
    for package in sorted(packages, key=lambda package: package["metadata"]["name"].lower()):
        about = package["metadata"]
        lines.append(f"{about['name'].lower()}=={about['version']} \\")
        lines.append(f"    --hash=sha256:{digest(package['download_info'])}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    LOCK.write_text(lock(resolve()))
