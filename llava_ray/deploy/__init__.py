"""Serve the chosen variant: start or update the Serve application, and ask it one real question."""

import json
import os

from llava_ray.artifacts.identity import artifact_id
from llava_ray.artifacts.records import ChosenVariant, DeploymentRecord
from llava_ray.artifacts.store import ArtifactStore, local_folder
from llava_ray.config.run import RunConfig
from llava_ray.deploy.probe import MAX_TOKENS, ask, curl_command, probe_request


def run(config: RunConfig, chosen: ChosenVariant) -> DeploymentRecord:
    """Return the running endpoint, which outlives this job; one that runs already is reused.

    Raises ResourceError when the port is taken, no replica fits the cluster or the question is not
    answered, ConfigError when the endpoint would be open to others without an API key.
    """
    # Not above: a job that only shows its config does not load Ray.
    from llava_ray.deploy.application import APP_NAME, Target, ensure_served

    store = ArtifactStore(config.storage.uri)
    settings = {
        **config.serve.model_dump(mode="json"),
        "system_prompt": config.model.system_prompt,
    }
    name = artifact_id(DeploymentRecord.kind, settings, [chosen.id])
    target = Target(config, chosen, store, deployment_id=name)
    key = os.environ.get(config.serve.api_key_env)

    def ask_again(found: DeploymentRecord) -> DeploymentRecord:
        ensure_served(target)
        ask(found.url, (local_folder(found) / "request.json").read_bytes(), key)
        return found

    if found := store.find(DeploymentRecord, name):
        return ask_again(found)
    with store.build(DeploymentRecord, name, settings=settings, parents=[chosen.id]) as build:
        if build.found:
            return ask_again(build.found)
        device = ensure_served(target)
        tokens = min(MAX_TOKENS, config.serve.max_new_tokens)
        request = probe_request(store, chosen, target.model_name, config.data.question, tokens)
        (build.folder / "request.json").write_bytes(request)
        answer = ask(target.url, request, key)
        (build.folder / "answer.json").write_text(json.dumps(answer, indent=1), encoding="utf-8")
        return build.finish(
            DeploymentRecord,
            device=device,
            slug=chosen.slug,
            variant_uri=chosen.variant_uri,
            url=target.url,
            app_name=APP_NAME,
            model_name=target.model_name,
            curl=curl_command(
                target.url,
                store.storage.join(f"{DeploymentRecord.kind}/{name}/request.json"),
                key_env=config.serve.api_key_env if key else None,
            ),
        )
