"""Records of a finished run with the tiny model, made without training or measuring."""

from PIL import Image, ImageDraw
from small_data import png_of, write_dataset

from llava_ray.artifacts.records import (
    ChosenVariant,
    DatasetRecord,
    Record,
    Scorecard,
    Spread,
    Variant,
)
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import RunConfig
from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import Sample
from llava_ray.models.folder import EMBEDDED
from llava_ray.quantize.registry import spec_for
from llava_ray.quantize.spec import Calibration

SLUG = "none-fp32"


def make_variant(store: ArtifactStore, slug: str = SLUG) -> Variant:
    spec = spec_for(slug)
    with store.build(Variant, f"variant-{slug}", settings={}) as build:
        calibration = Calibration(dataset_uri="", num_samples=0)
        spec.quantize(EMBEDDED, build.folder, calibration, "cpu")
        return build.finish(
            Variant, device="cpu", slug=slug, method="none", bits_per_weight=int(slug[-2:]),
            quantize_s=1.0, peak_memory_bytes=1,
        )  # fmt: skip


def make_chosen(config: RunConfig, *others: str) -> ChosenVariant:
    """Return a choice of SLUG, which was measured with others."""
    store = ArtifactStore(config.storage.uri)
    dataset = _dataset(store)
    variant, *rest = (make_variant(store, slug) for slug in (SLUG, *others))
    cards = [_scorecard(store, each, dataset).id for each in (variant, *rest)]
    with store.build(ChosenVariant, "chosen-test", settings={}, parents=cards) as build:
        return build.finish(
            ChosenVariant, device="cpu", slug=SLUG, variant_uri=variant.uri,
            reasons=("fastest",), against={},
        )  # fmt: skip


def _dataset(store: ArtifactStore) -> DatasetRecord:
    with store.build(DatasetRecord, "dataset-test", settings={}) as build:
        image = Image.new("RGB", (300, 200), "white")
        ImageDraw.Draw(image).text((100, 90), "STOP", fill="red")
        turn = Turn("Describe this image in detail.", 1, "A sign.")
        sample = Sample("0", ("0.png",), (turn,), pictures=(png_of(image),))
        write_dataset(build.folder, [], [sample])
        return build.finish(
            DatasetRecord, device="cpu", source="test", num_train=0, num_test=1, rejected={}
        )


def _scorecard(store: ArtifactStore, variant: Variant, dataset: DatasetRecord) -> Scorecard:
    spread = Spread(median=1.0, low=0.5, high=2.0, repeats=3)
    fields: dict[str, object] = {}
    for name, field in Scorecard.model_fields.items():
        if field.is_required() and name not in Record.model_fields:
            fields[name] = spread if field.annotation is Spread else _plain(field.annotation)
    fields |= {"slug": variant.slug, "variant_uri": variant.uri, "top1_agreement": 0.99}
    with store.build(
        Scorecard, f"scorecard-{variant.slug}", settings={}, parents=[variant.id, dataset.id]
    ) as build:
        return build.finish(Scorecard, device="cpu", **fields)


def _plain(annotation: object) -> object:
    text = str(annotation)
    if "dict" in text:
        return {}
    if "tuple" in text:
        return ()
    return {"int": 1, "float": 1.0, "str": "x", "bool": False}[getattr(annotation, "__name__", "")]
