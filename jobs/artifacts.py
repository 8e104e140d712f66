"""List what lies in storage.uri, and why an artifact is another than the last of its kind.

python jobs/artifacts.py storage.uri=s3://mine/runs
python jobs/artifacts.py --unneeded            # what no chosen variant or sweep rests on
python jobs/artifacts.py --unneeded --delete --dry-run
python jobs/artifacts.py --unneeded --delete
"""

from llava_ray.artifacts.inventory import describe, unneeded
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.cli import argument_parser
from llava_ray.config.run import load_config
from llava_ray.console import errors_in_one_line, set_up_logging

if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--unneeded", action="store_true", help="only what nothing rests on")
    parser.add_argument("--delete", action="store_true", help="delete what --unneeded lists")
    arguments = parser.parse_intermixed_args()
    set_up_logging()
    with errors_in_one_line():
        store = ArtifactStore(load_config(arguments.config, arguments.overrides).storage.uri)
        records = store.everything()
        if arguments.unneeded or arguments.delete:
            records = unneeded(records)
        print("\n".join(describe(records)) or f"nothing at {store.storage.uri}")
        if arguments.delete and not arguments.dry_run:
            print(f"{store.delete(records) / 1e6:.1f} MB deleted")
