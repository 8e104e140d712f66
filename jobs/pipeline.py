"""The whole line: captions in, a served quantized LLaVA out."""

from llava_ray.artifacts.records import ChosenVariant, DeploymentRecord
from llava_ray.cli import run_job
from llava_ray.config.run import RunConfig
from llava_ray.pipeline import run_choose, run_deploy


def choose_and_deploy(config: RunConfig) -> tuple[ChosenVariant, DeploymentRecord]:
    """Return the choice, whose folder holds the report, beside the deployment."""
    chosen = run_choose(config)
    return chosen, run_deploy(config, chosen)


if __name__ == "__main__":
    result = run_job(__doc__, choose_and_deploy)
    if result is not None:
        chosen, deployment = result
        if chosen.missing:
            print(f"missing: {chosen.missing}")
        print(f"report:  {chosen.uri}/report.html")
        print(f"variant: {deployment.slug}")
        print(f"ask it:  {deployment.curl}")
