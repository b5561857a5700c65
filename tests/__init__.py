"""The tests. Environment variables that libraries read at import are set here, before any of them is imported."""

import atexit
import os
import shutil
import socket
import tempfile

if "TEST_HUB_PORT" not in os.environ:  # pytest-xdist workers inherit the variables from pytest
    # The Hub is the local server of test_hub.py; no other test can reach a Hub.
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    cache = tempfile.mkdtemp(prefix="hf-home-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ |= {
        "TEST_HUB_PORT": str(port),
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": cache,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "HF_TOKEN": "",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # progress bars would mix with the messages that tests check
    }
HUB_PORT, HF_HOME = int(os.environ["TEST_HUB_PORT"]), os.environ["HF_HOME"]
