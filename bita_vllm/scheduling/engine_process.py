"""The engine's own process ends when its front end is gone.

When the API server is killed, vLLM's engine process waits for requests for ever, and with it the memory that the next
server needs; only its workers watch their parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

from vllm.logger import init_logger

logger = init_logger("vllm.bita")

# vLLM's name for such a process (vllm/v1/engine/utils.py)
ENGINE_PROCESS = "EngineCore"
SHUTDOWN_S = 20  # for vLLM's own way out, which may wait for a step


def end_with_front_end() -> None:
    """Watch the parent, if this is an engine process of vLLM; its end is a SIGTERM, after a while a SIGKILL."""
    parent = multiprocessing.parent_process()
    name = multiprocessing.current_process().name
    if parent is None or not name.startswith(ENGINE_PROCESS):
        return

    def watch() -> None:
        wait([parent.sentinel])
        logger.error("bita: The API server is gone, so its engine ends.")
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(SHUTDOWN_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="bita-front-end", daemon=True).start()
