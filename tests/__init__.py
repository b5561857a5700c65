"""The tests. Environment variables that libraries read at import are set here, before any of them is imported."""

import atexit
import os
import shutil
import socket
import tempfile

# The Hub is the local server of test_hub.py; no other test can reach a Hub.
with socket.create_server(("127.0.0.1", 0)) as unused:
    HUB_PORT: int = unused.getsockname()[1]
HF_HOME = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
os.environ |= {
    "HF_ENDPOINT": f"http://127.0.0.1:{HUB_PORT}",
    "HF_HOME": HF_HOME,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    "HF_TOKEN": "",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",  # progress bars would mix with the messages that tests check
}
