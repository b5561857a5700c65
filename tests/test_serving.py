"""`docs/serving.md`: its command and its snippet answer as the pipeline does."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from stages.data.tokenizer import load_tokenizer
from stages.templates.selection import load_template
from tests.clone import ROOT, copy_clone
from tools.export import tuned_answers

pytestmark = pytest.mark.subprocess
PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urlopen(url)
            return
        except URLError:
            assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)


def test_transformers_serve_answers_as_the_pipeline_does(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stages.runtime.params import GenerateParams, load_params

    monkeypatch.chdir(copy_clone(ran, tmp_path / "clone"))
    (command,) = re.findall(r"^transformers serve .*", PAGE, re.MULTILINE)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    options = ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    program = [str(Path(sys.executable).with_name("transformers")), *command.split()[1:], *options]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}
    snippet = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0].replace("localhost:8000", f"127.0.0.1:{port}")
    snippet = snippet.replace("max_tokens=64", "max_tokens=4")
    names: dict[str, object] = {}
    with subprocess.Popen(program, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server)
            exec(snippet, names)
        finally:
            server.terminate()

    params = load_params(GenerateParams)
    tokenizer = load_tokenizer(Path("models/tuned"))
    prompts = load_template(params.template, tokenizer).encode_prompts(["What is the capital of Australia?"])
    capsys_out = capsys.readouterr().out
    (answer,) = tuned_answers(prompts, tokenizer, params)
    assert params.max_new_tokens == 4
    assert capsys_out.strip() == str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
    assert names["reply"].usage.prompt_tokens == len(prompts[0])  # type: ignore[attr-defined]
