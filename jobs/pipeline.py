"""The whole line: captions in, a served quantized LLaVA out."""

from llava_ray.cli import run_job
from llava_ray.config import RunConfig
from llava_ray.pipeline import run_choose, run_deploy
from llava_ray.records import DeploymentRecord


def report_and_deploy(config: RunConfig) -> tuple[str, DeploymentRecord]:
    """Return the report's folder beside the deployment."""
    return run_choose(config).uri, run_deploy(config)


if __name__ == "__main__":
    result = run_job(__doc__, report_and_deploy)
    if result is not None:
        report_uri, deployment = result
        print(f"report:  {report_uri}/report.html")
        print(f"variant: {deployment.slug}")
        print(f"ask it:  {deployment.curl}")
