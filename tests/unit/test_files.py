"""Files that are complete or absent, and folders that one process owns."""

import os
import signal
import time

import pytest

from utils.files import FolderInUse, lock_folder, unlock_folder


def test_a_lock_is_let_go_with_its_process(tmp_path):
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        held = lock_folder(tmp_path)
        os.write(writing, held.name.encode())
        time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    with pytest.raises(FolderInUse, match=f"process {process} on "):
        held = lock_folder(tmp_path)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    file = lock_folder(tmp_path)
    unlock_folder(file)
    assert list(tmp_path.iterdir()) == []
