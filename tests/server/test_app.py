"""serve/app.py and serve/config.yaml, without a cluster."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from llava_ray.errors import ConfigError
from llava_ray.server.guard import key_digest
from llava_ray.server.settings import AppArgs, is_loopback

ROOT = Path(__file__).parents[2]


def _args(**changes: object) -> AppArgs:
    return AppArgs.model_validate({"models": [{"variant_uri": "runs/variant/x"}], **changes})


def test_the_config_file_is_one_that_serve_and_the_application_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.serve.schema import ServeDeploySchema

    monkeypatch.setenv("LLAVA_RAY_VARIANT", "/runs/variant/variant-1")
    tree = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(tree)
    application = schema.applications[0]
    assert application.import_path == "llava_ray.server.application:build"
    args = AppArgs.model_validate(application.args)
    assert args.models[0].variant_uri == "/runs/variant/variant-1"
    assert args.host == schema.http_options.host == "127.0.0.1"


def test_an_unset_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_RAY_VARIANT", raising=False)
    with pytest.raises(ValidationError, match="LLAVA_RAY_VARIANT.*not set where"):
        AppArgs.model_validate({"models": [{"variant_uri": "${LLAVA_RAY_VARIANT}"}]})


def test_serve_validates_the_arguments_of_build() -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from serve.app import build

    with pytest.raises(ValidationError, match="no_such_key"):
        call_user_app_builder_with_args_if_necessary(build, {"no_such_key": 1})


def test_build_binds_one_deployment_for_all_models() -> None:
    from serve.app import build

    models = [{"variant_uri": "a", "name": "a"}, {"variant_uri": "b", "name": "b"}]
    limits = {"max_concurrent_requests": 16, "max_queued_requests": 64}
    application = build(
        _args(models=models, host="127.0.0.1", gpus_per_replica=0.5, max_replicas=3, **limits)
    )
    deployment = application._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == 0.5
    config = deployment._deployment_config
    assert config.autoscaling_config.max_replicas == 3
    assert config.max_ongoing_requests > 2 * 16 + 64, "what waits counts for autoscaling"


def test_an_open_host_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_ray.server.application import key_digests

    monkeypatch.delenv("LLAVA_RAY_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.com"):
        with pytest.raises(ConfigError, match="may be reached by others"):
            key_digests(_args(host=host))
    for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1"):
        assert is_loopback(host)
        assert key_digests(_args(host=host)) == []
    monkeypatch.setenv("LLAVA_RAY_API_KEY", "sk-1")
    assert key_digests(_args(host="0.0.0.0")) == [key_digest("sk-1")]
