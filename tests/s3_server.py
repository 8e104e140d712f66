"""A real S3 server, moto's, in a process of its own: it counts, it delays, and it goes away.

For tests and measurements; needs the `dev` extra. `python tests/s3_server.py DELAY_S` prints its
port, and how to use it from a shell. Then each line of its standard input is a command, answered by
a line of JSON: `counts`, or `gone SECONDS`.
"""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

BUCKET = "bucket"


class S3Server:
    """The server as its tests see it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process, self._turn = process, threading.Lock()
        assert process.stdout is not None
        self.port = int(process.stdout.readline())
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def counts(self, method: str, text: str) -> int:
        """Return how many requests of a method had a text in their path so far."""
        counts: dict[str, int] = self._ask("counts")
        return sum(
            count for key, count in counts.items() if key.startswith(f"{method} ") and text in key
        )

    def gone(self, seconds: float) -> None:
        """Stop listening at once, and drop all connections, for so long."""
        self._ask(f"gone {seconds}")

    def _ask(self, command: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._turn:
            print(command, file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def s3_server(delay_s: float = 0.0) -> Iterator[S3Server]:
    """Run one, with a bucket."""
    with subprocess.Popen(
        [sys.executable, __file__, str(delay_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield S3Server(process)
        finally:
            process.kill()


def _serve(delay_s: float) -> None:
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    moto = DomainDispatcherApplication(create_backend_app)
    counts: Counter[str] = Counter()
    gone = threading.Event()

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        if gone.is_set():
            raise ConnectionError
        counts[f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"] += 1
        time.sleep(delay_s)
        return moto(environ, start_response)

    def listen(port: int) -> Any:
        server = make_server(
            "127.0.0.1", port, application, threaded=True, request_handler=MotoRequestHandler
        )
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    import boto3

    server = listen(0)
    port = server.port
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id="id",
        aws_secret_access_key="secret", region_name="us-east-1",
    )  # fmt: skip
    client.create_bucket(Bucket=BUCKET)
    print(port, flush=True)
    settings = f"AWS_ENDPOINT_URL=http://127.0.0.1:{port} AWS_DEFAULT_REGION=us-east-1"
    print(f"export {settings} AWS_ACCESS_KEY_ID=id AWS_SECRET_ACCESS_KEY=secret", file=sys.stderr)
    for line in sys.stdin:
        command, _, value = line.strip().partition(" ")
        if command == "gone":
            gone.set()
            server.shutdown()
            server.server_close()
            print("{}", flush=True)
            time.sleep(float(value))
            gone.clear()
            server = listen(port)
        else:
            print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
