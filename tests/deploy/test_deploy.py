"""The deploy stage on a real Serve application with the tiny model."""

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from askers import asking, engine_pids, replica_pids, uploading_slowly, ways
from free_port import free_port
from hostile import one_of_each
from openai import OpenAI
from served_variant import SLUG, make_chosen

from llava_ray import deploy
from llava_ray.artifacts.records import ChosenVariant, DeploymentRecord
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError, ResourceError
from llava_ray.resources.capacity import free_nodes

BESIDE = "none-bf16"
QUESTION: dict[str, Any] = {
    "model": SLUG,
    "messages": [{"role": "user", "content": "What does the sign say?"}],
    "max_tokens": 20,
    "extra_body": {"ignore_eos": True},
}
HOSTILE_ROUNDS = 17 if "LLAVA_RAY_SLOW" in os.environ else 2
"""Of 60 requests each."""
HOSTILE_GROWTH_BYTES = 64e6 if "LLAVA_RAY_SLOW" in os.environ else 96e6
"""In the second half: until some 2,000 requests the engine's 32 kept prefixes fill up, and in a
short run readers of pictures are still being loaded."""


@pytest.fixture(scope="module", params=["python", "haproxy"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("deploy")
    return RunConfig.model_validate(
        {
            "storage": {"uri": str(root / "runs")},
            "resources": {"node_types": "up"},
            "serve": {
                "port": free_port(),
                "proxy": request.param,
                "cpus_per_replica": 0.5,
                "max_concurrent_requests": 2,
                "max_new_tokens": 250,
                "context": 512,
            },
        }
    )


@pytest.fixture(scope="module")
def chosen(config: RunConfig) -> ChosenVariant:
    return make_chosen(config, BESIDE)


def test_a_taken_port_is_one_line(
    ray_local: None, config: RunConfig, chosen: ChosenVariant
) -> None:
    with (
        socket.create_server(("127.0.0.1", config.serve.port)),
        pytest.raises(ResourceError, match=f"port {config.serve.port} of 127.0.0.1"),
    ):
        deploy.run(config, chosen)


@pytest.fixture(scope="module")
def served(ray_local: None, config: RunConfig, chosen: ChosenVariant) -> Iterator[DeploymentRecord]:
    from ray import serve

    yield deploy.run(config, chosen)
    serve.shutdown()


def test_stages_do_not_count_on_what_the_replica_holds(served: DeploymentRecord) -> None:
    assert free_nodes()[0][0].num_cpus == 2 - 0.5


def test_the_curl_line_answers_about_an_image(served: DeploymentRecord) -> None:
    done = subprocess.run(
        shlex.split(served.curl), capture_output=True, check=True, timeout=60, text=True
    )
    answer = json.loads(done.stdout)
    assert answer["model"] == "none-fp32"
    assert answer["usage"]["prompt_tokens"] > 196
    kept = json.loads((Path(served.uri) / "answer.json").read_text())
    assert answer["choices"] == kept["choices"]


def test_openais_client_streams_through_serve(served: DeploymentRecord) -> None:
    with OpenAI(base_url=served.url, api_key="unused") as client:
        asked = json.loads((Path(served.uri) / "request.json").read_text()) | {"max_tokens": 8}
        plain = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == plain.choices[0].message.content
    assert plain.usage.completion_tokens <= 8


def _resident_bytes() -> dict[str, int]:
    import psutil

    pids = {"replica": replica_pids(), "engine": engine_pids()}
    return {name: psutil.Process(pid).memory_info().rss for name, (pid,) in pids.items()}


def test_hostile_requests_leave_nothing_behind(served: DeploymentRecord) -> None:
    import httpx

    rng, held = random.Random(0), []
    headers = {"Content-Type": "application/json"}
    with httpx.Client(timeout=30, headers=headers) as client:
        for half in (HOSTILE_ROUNDS // 2, HOSTILE_ROUNDS - HOSTILE_ROUNDS // 2):
            for body in (body for _ in range(half) for body in one_of_each(rng, "none-fp32")):
                answer = client.post(f"{served.url}/chat/completions", content=body)
                assert answer.status_code in (200, 400, 404, 413), answer.text
                assert answer.status_code == 200 or answer.json()["error"]["message"]
            held.append(_resident_bytes())
    grown = {name: held[1][name] - held[0][name] for name in held[0]}
    assert max(grown.values()) < HOSTILE_GROWTH_BYTES, grown


def test_models_show_the_variants_digest_and_scorecard(served: DeploymentRecord) -> None:
    with OpenAI(base_url=served.url, api_key="unused") as client:
        model = client.models.list().data[0]
    assert model.digest.startswith("sha256:")
    assert model.deployment == served.id
    assert model.scorecard["top1_agreement"] == 0.99


def _series(served: DeploymentRecord, name: str, label: str = "") -> list[float]:
    import httpx

    text = httpx.get(served.url.removesuffix("/v1") + "/metrics").text
    lines = [line for line in text.splitlines() if line.startswith(f"ray_llava_ray_{name}{{")]
    return [float(line.split()[-1]) for line in lines if label in line]


def _await(condition: Callable[[], bool]) -> None:
    """Ray hands metrics on every few seconds."""
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def test_metrics_come_from_every_nodes_ray(served: DeploymentRecord) -> None:
    _await(lambda: sum(_series(served, "prompt_tokens_total", 'model="none-fp32"')) > 196)
    assert sum(_series(served, "time_to_first_token_seconds_count")) >= 1
    _await(lambda: max(_series(served, "memory_bytes", 'kind="resident"'), default=0) > 1e8)
    _await(lambda: 0 in _series(served, "waiting_requests"))


def test_the_dashboard_asks_for_series_that_there_are(served: DeploymentRecord) -> None:
    dashboard = (Path(__file__).parents[2] / "cluster" / "grafana.json").read_text()
    asked = set(re.findall(r"ray_llava_ray_\w+", dashboard))
    assert len(asked) >= 8
    # These have a series once they have happened.
    rare = {"ray_llava_ray_engine_restarts_total", "ray_llava_ray_canary_agreement_bucket"}
    for name in asked - rare:
        _await(lambda name=name: bool(_series(served, name.removeprefix("ray_llava_ray_"))))


def test_a_client_that_hangs_up_stops_the_engine(served: DeploymentRecord) -> None:
    with OpenAI(base_url=served.url, api_key="unused") as client:
        stream = client.chat.completions.create(
            model="none-fp32",
            messages=[{"role": "user", "content": "Go on."}],
            max_tokens=250,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
    _await(lambda: sum(_series(served, "requests_total", 'outcome="cancelled"')) >= 1)
    _await(lambda: _series(served, "active_requests") == [0])


def test_health_answers_while_the_engine_does_not(served: DeploymentRecord) -> None:
    """A stopped engine is ended, started again, and takes what had not begun.

    Meanwhile its two slots are taken, requests wait, and bodies come in slowly.
    """
    import httpx

    root = served.url.removesuffix("/v1")
    (engine,) = engine_pids()
    with uploading_slowly(served.url, 32), asking(served.url, 8) as askers:
        time.sleep(1.5)
        os.kill(engine, signal.SIGSTOP)
        stopped, statuses = time.monotonic(), [0]
        while statuses[-2:] != [503, 200]:
            start = time.monotonic()
            statuses.append(httpx.get(f"{root}/health").status_code)
            assert time.monotonic() - start < 2
            assert start - stopped < 60, statuses
            time.sleep(0.1)
    assert engine not in engine_pids()
    assert "whole" in ways(askers) and set(ways(askers)) <= {"whole", "cut"}, ways(askers)


def test_only_haproxy_listens_beyond_loopback(served: DeploymentRecord, config: RunConfig) -> None:
    import psutil

    def listening(name: str) -> set[tuple[str, int]]:
        return {
            (connection.laddr.ip, connection.laddr.port)
            for process in psutil.Process().children(recursive=True)
            if name in " ".join(process.cmdline())
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }

    name = "haproxy" if config.serve.proxy == "haproxy" else "ProxyActor"
    assert ("127.0.0.1", config.serve.port) in listening(name)
    assert listening("llava_ray.server.loading") == set()


def test_a_second_call_reuses_the_deployment(
    served: DeploymentRecord, config: RunConfig, chosen: ChosenVariant
) -> None:
    start = time.monotonic()
    assert deploy.run(config, chosen) == served
    assert time.monotonic() - start < 5


def test_another_address_for_the_same_cluster_is_refused(
    served: DeploymentRecord, config: RunConfig, chosen: ChosenVariant
) -> None:
    elsewhere = config.serve.model_copy(update={"port": free_port()})
    with pytest.raises(ResourceError, match="does not listen at"):
        deploy.run(config.model_copy(update={"serve": elsewhere}), chosen)


def test_another_proxy_for_the_same_cluster_is_refused(
    served: DeploymentRecord, config: RunConfig, chosen: ChosenVariant
) -> None:
    running = config.serve.proxy
    other = config.serve.model_copy(
        update={"proxy": "python" if running == "haproxy" else "haproxy"}
    )
    with pytest.raises(ResourceError, match=f"runs with serve.proxy={running}"):
        deploy.run(config.model_copy(update={"serve": other}), chosen)


def test_one_request_id_comes_with_each_answer(served: DeploymentRecord) -> None:
    with urllib.request.urlopen(f"{served.url}/models") as answer:
        assert len(answer.headers.get_all("x-request-id")) == 1


Outcomes = dict[bool, list[object]]


@pytest.fixture(scope="module")
def upgraded(
    served: DeploymentRecord, config: RunConfig, chosen: ChosenVariant
) -> tuple[DeploymentRecord, Outcomes]:
    """A deployment with another variant beside the winner, and what clients saw meanwhile."""
    import threading

    outcomes: Outcomes = {False: [], True: []}
    over = threading.Event()

    def keep_asking(stream: bool) -> None:
        with OpenAI(base_url=served.url, api_key="unused", max_retries=0) as client:
            while not over.is_set():
                try:
                    answer = client.chat.completions.create(**QUESTION, stream=stream)
                    last = list(answer)[-1] if stream else answer
                    outcomes[stream].append(last.choices[0].finish_reason)
                except Exception as error:
                    outcomes[stream].append(error)

    threads = [threading.Thread(target=keep_asking, args=(stream,)) for stream in outcomes]
    for thread in threads:
        thread.start()
    try:
        more = {"beside": (BESIDE,), "canary": BESIDE, "canary_share": 1.0}
        changed = config.serve.model_copy(update=more)
        second = deploy.run(config.model_copy(update={"serve": changed}), chosen)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return second, outcomes


def test_a_new_deployment_takes_over_without_a_failed_request(
    served: DeploymentRecord, upgraded: tuple[DeploymentRecord, Outcomes]
) -> None:
    second, outcomes = upgraded
    assert second.id != served.id
    for found in outcomes.values():
        assert len(found) > 3
        assert [outcome for outcome in found if outcome != "length"] == []


def test_a_variant_beside_answers_from_the_same_replica_and_is_the_canary(
    upgraded: tuple[DeploymentRecord, Outcomes],
) -> None:
    record, _ = upgraded
    _await(lambda: (len(replica_pids()), len(engine_pids())) == (1, 2))
    with OpenAI(base_url=record.url, api_key="unused") as client:
        assert [model.id for model in client.models.list()] == [SLUG, BESIDE]
        for slug in (SLUG, BESIDE):
            answer = client.chat.completions.create(**QUESTION | {"model": slug})
            assert answer.model == slug and answer.choices[0].finish_reason == "length"
    # Of what was asked of the winner alone.
    _await(lambda: sum(_series(record, "canary_answers_total", f'model="{BESIDE}"')) >= 1)
    assert sum(_series(record, "canary_answers_total", 'outcome="failed"')) == 0


def test_a_replica_that_fits_no_node_is_refused(
    ray_local: None, config: RunConfig, chosen: ChosenVariant
) -> None:
    greedy = config.serve.model_copy(update={"cpus_per_replica": 500.0, "port": free_port()})
    with pytest.raises(ResourceError, match="asks for 500 CPUs: the cluster has no node for that"):
        deploy.run(config.model_copy(update={"serve": greedy}), chosen)


def test_an_open_host_needs_a_key(
    ray_local: None, config: RunConfig, chosen: ChosenVariant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAVA_RAY_API_KEY", raising=False)
    opened = config.serve.model_copy(update={"host": "0.0.0.0", "port": free_port()})
    with pytest.raises(ConfigError, match=r"set \$LLAVA_RAY_API_KEY"):
        deploy.run(config.model_copy(update={"serve": opened}), chosen)
    assert "LLAVA_RAY_API_KEY" not in os.environ


def test_a_variant_beside_must_have_been_measured(
    ray_local: None, config: RunConfig, chosen: ChosenVariant
) -> None:
    more = config.serve.model_copy(
        update={"beside": ("gguf-q2_k",), "port": free_port(), "cpus_per_replica": 0.1}
    )
    with pytest.raises(
        ConfigError, match="no variant 'gguf-q2_k' beside the winner; there: none-bf16"
    ):
        deploy.run(config.model_copy(update={"serve": more}), chosen)
