"""A finished storage with measured variants, for reports: figures are made up, images drawn."""

import json
from pathlib import Path

from PIL import Image, ImageDraw
from small_data import png_of, write_dataset

from llava_ray.artifacts.records import (
    DatasetRecord,
    Generation,
    MergedModel,
    QuantizationRun,
    Scorecard,
    Spread,
    Variant,
    VariantFailure,
)
from llava_ray.artifacts.store import ArtifactStore
from llava_ray.config.run import RunConfig, load_config
from llava_ray.models.chat_template import Turn
from llava_ray.models.conversation import Sample

# slug, bytes, tokens/s, KL, words read
SHAPES = (
    ("none-fp16", 14_127_000_000, 39.3, 2e-7, 0.91),
    ("bnb-int8", 7_460_000_000, 11.2, 0.0021, 0.90),
    ("bnb-nf4", 4_710_000_000, 26.6, 0.0312, 0.88),
    ("bnb-fp4", 4_710_000_000, 25.9, 0.0664, 0.84),
    ("hqq-w8-g64", 7_820_000_000, 21.0, 0.0006, 0.91),
    ("hqq-w4-g64", 4_540_000_000, 62.6, 0.0287, 0.89),
    ("hqq-w3-g64", 3_800_000_000, 48.1, 0.1530, 0.77),
    ("hqq-w2-g64", 2_960_000_000, 71.9, 1.8200, 0.12),
    ("hqq-w1-g64", 2_150_000_000, 75.0, 9.4000, 0.00),
    ("gguf-q8_0", 7_790_000_000, 82.0, 0.0011, 0.91),
    ("gguf-q4_k_m", 4_700_000_000, 121.0, 0.0349, 0.88),
    ("gguf-q2_k", 3_160_000_000, 127.0, 0.2110, 0.71),
)
FAILURES = (
    VariantFailure(
        slug="awq-w4-g128",
        reason="needs 'pip install llava_ray[awq]' on the worker image <b>not bold</b>",
    ),
)
SIGNS = ("OPEN LATE", "FRESH BREAD", "PLATFORM 9")


def make_config(storage: Path, *overrides: str) -> RunConfig:
    return load_config(None, [f"storage.uri={storage}", *overrides])


def make_dataset(store: ArtifactStore) -> DatasetRecord:
    with store.build(DatasetRecord, "dataset-aaaaaaaaaaaa", settings={}) as build:
        rows = []
        for index, words in enumerate(SIGNS):
            image = Image.new("RGB", (640, 420), (40 + 60 * index, 90, 130))
            draw = ImageDraw.Draw(image)
            draw.rectangle((120, 130, 520, 290), fill=(250, 245, 230))
            draw.text((150, 170), words, fill=(20, 20, 20), font_size=52)
            turn = Turn("Describe this image in detail.", 1, reference(words))
            name = f"{index}.png"
            rows.append(Sample(str(index), (name,), (turn,), pictures=(png_of(image),)))
        write_dataset(build.folder, rows, rows)
        return build.finish(
            DatasetRecord, device="cpu", source="scene-text", num_train=3, num_test=3, rejected={},
        )  # fmt: skip


def reference(words: str) -> str:
    return f'A cream sign with the words "{words}" in dark letters on a plain wall.'


def make_scorecards(storage: Path, *, factor: float = 1.0) -> list[Scorecard]:
    """Write data set, merged model, variants and scorecards; return the last."""
    store = ArtifactStore(str(storage))
    dataset = make_dataset(store)
    with store.build(MergedModel, "merged-bbbbbbbbbbbb", settings={}) as build:
        merged = build.finish(
            MergedModel, device="cpu", base_model="llava-hf/llava-1.5-7b-hf",
            base_model_sha256="c0ffee" * 10, max_logit_difference=1e-5, mean_logit_difference=1e-6,
            rounded_max_logit_difference=1e-2,
        )  # fmt: skip
    times = {shape[0]: 12.5 for shape in SHAPES}
    with store.build(
        QuantizationRun, "quantization-cccccccccccc", settings={}, parents=(merged.id,)
    ) as build:
        build.finish(QuantizationRun, device="cpu", variant_wall_s=times, failures=FAILURES)
    return [_scorecard(store, dataset, merged, *shape, factor) for shape in SHAPES]


def _scorecard(
    store: ArtifactStore, dataset: DatasetRecord, merged: MergedModel, slug: str, size: int,
    rate: float, kl: float, recall: float, factor: float,
) -> Scorecard:  # fmt: skip
    with store.build(Variant, f"variant-{slug}", settings={}, parents=(merged.id,)) as build:
        (build.folder / "model.safetensors").write_bytes(b"weights")
        variant = build.finish(
            Variant, device="cpu", slug=slug, method=slug.partition("-")[0], bits_per_weight=4.5,
            quantize_s=12.5, peak_memory_bytes=9 * 10**9, estimated_bytes=int(size * 0.99 * factor),
        )  # fmt: skip
    texts = [reference(words if recall > 0.5 else "OPFN LAIE") for words in SIGNS]
    pairs = enumerate(zip(SIGNS, texts, strict=True))
    with store.build(Scorecard, f"scorecard-{slug}", settings={}, parents=(variant.id,)) as build:
        sums = [
            {"tokens": 20, "kl_sum": 20 * kl * share, "nll_sum": 20.0, "top1_matches": 18}
            for share in (0.6, 1.0, 1.4)
        ]
        (build.folder / "fidelity.json").write_text(json.dumps(sums), encoding="utf-8")
        return build.finish(
            Scorecard,
            device="NVIDIA H100 80GB HBM3",
            slug=slug,
            variant_uri=variant.uri,
            dataset_uri=dataset.uri,
            versions={"torch": "2.13.0", "transformers": "5.23.0"},
            variant_bytes=int(size * factor),
            memory_bytes=int(size * 1.12 * factor),
            weight_bytes=int(size * 0.93 * factor),
            copy_bytes_per_s=2.9e12,
            load_s=4.2,
            prefill_s=Spread(median=0.061, low=0.06, high=0.064, repeats=3),
            decode_tokens_per_s=Spread(median=rate, low=rate * 0.985, high=rate * 1.01, repeats=3),
            kl_divergence=Spread(median=kl, low=kl * 0.8, high=kl * 1.25, repeats=16),
            top1_agreement=max(0.02, 1 - kl),
            perplexity=2.7 * (1 + kl),
            scores={
                "rouge_l": 0.4 + recall / 4,
                "cider_d": 2 * recall,
                "word_recall": recall,
                "character_error_rate": (1 - recall) / 2,
            },
            generations=tuple(
                Generation(image=f"{index}.png", reference=reference(words), text=text)
                for index, (words, text) in pairs
            ),
        )
