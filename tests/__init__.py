"""The tests. Environment variables that libraries read at import are set here, before any of them is imported."""

import atexit
import os
import shutil
import socket
import tempfile

if "TEST_HUB_PORT" not in os.environ:  # pytest-xdist workers inherit the variables from pytest
    # Git sets GIT_DIR and others for its hooks; DVC sets its own for the commands of stages.
    for name in [name for name in os.environ if name.startswith(("GIT_", "DVC_"))]:
        del os.environ[name]
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
        "HF_HUB_DISABLE_TELEMETRY": "1",  # else the client asks the Hub which agents there are
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "HF_TOKEN": "",
        # Without the settings of this machine, such as signed commits or a default remote.
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "DVC_GLOBAL_CONFIG_DIR": cache,
        "DVC_SYSTEM_CONFIG_DIR": cache,
        "DVC_NO_ANALYTICS": "1",  # where no project says so; each would start a process
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # progress bars would mix with the messages that tests check
    }
HUB_PORT, HF_HOME = int(os.environ["TEST_HUB_PORT"]), os.environ["HF_HOME"]
