"""An engine process ends with its front end; every other process stays as it is."""

import multiprocessing
import os
import signal
import threading
import time

import psutil
import pytest

from bita_vllm.scheduling.engine_process import end_with_front_end

fork = multiprocessing.get_context("fork")


def engine(ready):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_front_end()
    ready.send(os.getpid())
    time.sleep(60)


def front_end(name, ready):
    fork.Process(target=engine, args=[ready], name=name).start()
    time.sleep(60)


@pytest.mark.parametrize(
    "name, ends", [("EngineCore", True), ("EngineCore_DP1", True), ("mine", False)]
)
def test_only_an_engine_process_ends_with_its_parent(name, ends):
    reader, writer = fork.Pipe(duplex=False)
    parent = fork.Process(target=front_end, args=[name, writer])
    parent.start()
    assert reader.poll(30)
    child = psutil.Process(reader.recv())
    parent.kill()
    parent.join()
    deadline = time.monotonic() + (10 if ends else 1)
    try:
        while alive(child) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert alive(child) != ends
    finally:
        if alive(child):
            child.kill()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_an_engine_in_the_users_own_process_is_not_watched():
    end_with_front_end()
    assert "bita-front-end" not in [thread.name for thread in threading.enumerate()]
