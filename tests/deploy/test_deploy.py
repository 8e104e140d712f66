"""The deploy stage on a real Serve application with the tiny model."""

import json
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from free_port import free_port
from openai import OpenAI
from served_variant import make_chosen

from llava_ray import deploy
from llava_ray.artifacts.records import ChosenVariant, DeploymentRecord
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError, ResourceError
from llava_ray.resources.capacity import free_nodes


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("deploy")
    return RunConfig.model_validate(
        {
            "storage": {"uri": str(root / "runs")},
            "serve": {
                "port": free_port(),
                "cpus_per_replica": 0.5,
                "max_concurrent_requests": 2,
                "max_new_tokens": 250,
                "context": 512,
            },
        }
    )


@pytest.fixture(scope="module")
def chosen(config: RunConfig) -> ChosenVariant:
    return make_chosen(config)


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
    assert [node.num_cpus for node in free_nodes()] == [2 - 0.5]


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


def test_models_show_the_variants_digest_and_scorecard(served: DeploymentRecord) -> None:
    with OpenAI(base_url=served.url, api_key="unused") as client:
        model = client.models.list().data[0]
    assert model.digest.startswith("sha256:")
    assert model.deployment == served.id
    assert model.scorecard["top1_agreement"] == 0.99


def test_metrics_of_all_replicas_come_from_the_ingress(served: DeploymentRecord) -> None:
    import httpx

    text = httpx.get(served.url.removesuffix("/v1") + "/metrics").text
    assert 'llava_ray_prompt_tokens_total{model="none-fp32"' in text
    assert 'llava_ray_queue_requests{model="none-fp32",replica="ingress"} 0.0' in text
    assert text.count("# HELP llava_ray_queue_requests ") == 1
    assert text.count("# HELP llava_ray_time_to_first_token_seconds ") == 1


def test_a_client_that_hangs_up_stops_the_engine(served: DeploymentRecord) -> None:
    import httpx

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
    for _ in range(100):
        text = httpx.get(served.url.removesuffix("/v1") + "/metrics").text
        found = [line for line in text.splitlines() if 'outcome="cancelled"' in line]
        if found:
            break
        time.sleep(0.1)
    assert found and float(found[0].split()[-1]) == 1
    active = [line for line in text.splitlines() if line.startswith("llava_ray_active_requests")]
    assert [float(line.split()[-1]) for line in active] == [0]


def test_nobody_is_told_the_routes(served: DeploymentRecord) -> None:
    import httpx

    assert httpx.get(served.url.removesuffix("/v1") + "/-/routes").status_code == 404


def test_haproxy_takes_the_requests_in_and_listens_on_loopback_only(
    served: DeploymentRecord,
) -> None:
    import psutil

    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in psutil.Process().children(recursive=True)
        if process.name() == "haproxy"
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert ("127.0.0.1", int(served.url.removesuffix("/v1").rpartition(":")[2])) in listening
    assert {address for address, _ in listening} == {"127.0.0.1"}


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


def test_a_new_deployment_takes_over_without_a_failed_request(
    served: DeploymentRecord, config: RunConfig, chosen: ChosenVariant
) -> None:
    import threading

    outcomes: dict[bool, list[object]] = {False: [], True: []}
    over = threading.Event()

    def keep_asking(stream: bool) -> None:
        with OpenAI(base_url=served.url, api_key="unused", max_retries=0) as client:
            while not over.is_set():
                try:
                    answer = client.chat.completions.create(
                        model="none-fp32",
                        messages=[{"role": "user", "content": "What does the sign say?"}],
                        max_tokens=20,
                        stream=stream,
                        extra_body={"ignore_eos": True},
                    )
                    last = list(answer)[-1] if stream else answer
                    outcomes[stream].append(last.choices[0].finish_reason)
                except Exception as error:
                    outcomes[stream].append(error)

    threads = [threading.Thread(target=keep_asking, args=(stream,)) for stream in outcomes]
    for thread in threads:
        thread.start()
    try:
        changed = config.serve.model_copy(update={"max_new_tokens": 32})
        second = deploy.run(config.model_copy(update={"serve": changed}), chosen)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert second.id != served.id
    for found in outcomes.values():
        assert len(found) > 3
        assert [outcome for outcome in found if outcome != "length"] == []


def test_a_replica_that_fits_no_node_is_refused(
    ray_local: None, config: RunConfig, chosen: ChosenVariant
) -> None:
    greedy = config.serve.model_copy(update={"cpus_per_replica": 500.0, "port": free_port()})
    with pytest.raises(ResourceError, match="500 CPUs each, and the cluster has 2"):
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
    with pytest.raises(ConfigError, match="no variant 'gguf-q2_k' beside the winner; there: none"):
        deploy.run(config.model_copy(update={"serve": more}), chosen)
