"""The command that a deployment prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

from llava_ray.deploy.probe import curl_command


def test_the_command_stays_short_for_a_request_in_an_object_store(tmp_path: Path) -> None:
    """B10"""
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"picture": "x" * 63_000}), encoding="utf-8")
    command = curl_command("http://127.0.0.1:8000/v1", f"file://{request}", key_env="KEY")
    assert len(command) < 400
    assert command.endswith('-H "authorization: Bearer $KEY"')
    read, _, rest = command.partition(" | ")
    assert rest.startswith("curl -s http://127.0.0.1:8000/v1/chat/completions ")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        read, shell=True, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert json.loads(done.stdout) == json.loads(request.read_text(encoding="utf-8"))
