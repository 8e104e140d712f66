"""A chosen variant with its card and passport, to a repository of the Hugging Face hub."""

import shutil
from pathlib import Path

from llava_ray.artifacts.records import ChosenVariant, Variant
from llava_ray.artifacts.storage import Storage, check_empty
from llava_ray.artifacts.store import CARD, PASSPORT, ArtifactStore, local_folder, read_record
from llava_ray.config.run import RunConfig
from llava_ray.errors import ConfigError


def find_variant(config: RunConfig, slug: str | None) -> Variant:
    """Return the variant chosen last in storage.uri, or the last that was made of a slug.

    Raises ConfigError where there is none.
    """
    store = ArtifactStore(config.storage.uri)
    if slug is None:
        chosen = store.find_all(ChosenVariant)
        if not chosen:
            raise ConfigError(
                f"storage.uri {config.storage.uri!r} has no chosen variant: run 'llava-ray choose' "
                "first, or name one with --variant"
            )
        return read_record(Variant, chosen[-1].variant_uri)
    made = [variant for variant in store.find_all(Variant) if variant.slug == slug]
    if not made:
        raise ConfigError(f"--variant {slug!r}: storage.uri {config.storage.uri!r} has none")
    return made[-1]


def lay_out(variant: Variant, out: Path) -> Path:
    """Write the files of a repository to an empty folder: the variant's, its card, its passport.

    Raises ConfigError for a folder that holds something, or a variant that was not measured yet.
    """
    check_empty(out)
    beside = {name: Storage(variant.uri).read_text(name) for name in (CARD, PASSPORT)}
    if missing := [name for name, text in beside.items() if text is None]:
        raise ConfigError(
            f"{variant.slug} has no {missing[0]} yet, which 'llava-ray choose' writes: measure it "
            "and choose first"
        )
    folder = local_folder(variant)
    for name in variant.files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, out / name)
    for name, text in beside.items():
        (out / name).write_text(text or "", encoding="utf-8")
    return out


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload a folder to the hub's repository, made where it is missing; return its address.

    Raises ConfigError without a token, for a wrong name, or where the hub refuses.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not huggingface_hub.get_token():
        raise ConfigError("no token for the hub: run 'hf auth login', or set HF_TOKEN")
    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except HFValidationError as error:
        raise ConfigError(f"--repo {repo!r}: {str(error).splitlines()[0]}") from error
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"--repo {repo!r}: the hub refuses ({' '.join(str(error).split())})"
        ) from error
    return str(address)
