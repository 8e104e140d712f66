"""Everything the report says, before it is laid out as HTML, Markdown or JSON."""

from itertools import groupby
from typing import Any

from llava_ray.artifacts.records import missing_line
from llava_ray.config.run import to_yaml
from llava_ray.report import article
from llava_ray.report.columns import make_columns, number, size_text
from llava_ray.report.findings import Findings, Origins
from llava_ray.report.passport import passport
from llava_ray.report.pictures import show
from llava_ray.report.plots import make_plots
from llava_ray.report.rows import make_rows


def make_content(findings: Findings, origins: Origins) -> dict[str, Any]:
    """Gather all parts, by the names that the templates know them under."""
    rows, model = make_rows(findings, origins), findings.config.model.path
    columns = make_columns(rows)
    return {
        "title": f"Quantized variants of {'the embedded model' if model == 'embedded' else model}",
        "missing": missing_line(
            {failure.slug: failure.reason for failure in findings.failures},
            len(findings.scorecards) + len(findings.failures),
        ),
        "winner": findings.winner.slug,
        "reasons": findings.reasons,
        "facts": _facts(findings),
        "limits": _limits(findings),
        "rows": rows,
        "columns": columns,
        "groups": {name: len(list(of)) for name, of in groupby(column.group for column in columns)},
        "plots": make_plots(rows),
        "pictures": show(findings, origins),
        "passports": {card.slug: passport(card.slug) for card in findings.scorecards},
        "notes": _notes(findings, origins),
        "conditions": _conditions(findings, origins),
        "article": article.CONDITIONS,
        "config_yaml": to_yaml(findings.config),
    }


def _facts(findings: Findings) -> list[tuple[str, str, str]]:
    """Return the figures of the summary: label, value and note."""
    best, base = findings.winner, findings.baseline
    rate, kl = best.decode_tokens_per_s.median, best.kl_divergence
    size_note, rate_note, read_note = "", "", ""
    if base and base.slug != best.slug:
        ratio = number(base.variant_bytes / best.variant_bytes)
        size_note = f"{ratio}× smaller than {base.slug}"
        rate_note = f"{number(rate / base.decode_tokens_per_s.median)}× {base.slug}"
        if "word_recall" in base.scores:
            read_note = f"{base.slug}: {base.scores['word_recall']:.1%}"
    facts = [
        ("on disk", size_text(best.variant_bytes), size_note),
        ("tokens/s", number(rate), rate_note),
        ("KL, nats", number(kl.median), f"95%: {number(kl.low)}–{number(kl.high)}"),
        ("same top token", f"{best.top1_agreement:.1%}", "against the baseline"),
    ]
    if "word_recall" in best.scores:
        facts.append(("words read", f"{best.scores['word_recall']:.1%}", read_note))
    return facts


def _limits(findings: Findings) -> list[str]:
    choose = findings.config.choose
    limits = []
    if choose.max_kl_divergence is not None:
        limits.append(f"KL divergence at most {choose.max_kl_divergence:g} nats per token")
    if choose.min_decode_tokens_per_s is not None:
        limits.append(f"at least {choose.min_decode_tokens_per_s:g} tokens/s")
    if choose.max_size_bytes is not None:
        limits.append(f"at most {size_text(choose.max_size_bytes)} on disk")
    if choose.must_open_in:
        limits.append(f"opens in {', '.join(choose.must_open_in)}")
    if not choose.may_choose_baseline:
        limits.append(f"not the baseline {findings.config.benchmark.baseline} itself")
    wanted = {"speed": "the fastest", "size": "the smallest", "fidelity": "the closest"}
    return [*limits, f"among those, {wanted[choose.prefer]} (choose.prefer={choose.prefer})"]


def _notes(findings: Findings, origins: Origins) -> list[str]:
    cards = findings.scorecards
    tested = min(findings.config.benchmark.caption_samples, origins.dataset.num_test)
    notes = [
        f"Captions were scored on {tested} held-out images, fidelity on "
        f"{cards[0].kl_divergence.repeats} teacher-forced captions; all variants saw the same "
        "pixels and the same tokens.",
        "The interval of the KL divergence is a bootstrap over samples with the same draws for "
        "every variant. The baseline's own row shows what storing its log probabilities in half "
        "precision and computing them again costs.",
    ]
    if len({card.device for card in cards}) > 1:
        notes.append("The variants were measured on different devices: do not compare speeds.")
    made = origins.quantization
    if made and len(made.variant_wall_s) > 1:
        notes.append(
            f"Making {len(made.variant_wall_s)} variants in parallel took {number(made.wall_s)} s; "
            f"one after the other they take {number(made.sum_s)} s."
        )
    return notes


def _conditions(findings: Findings, origins: Origins) -> list[tuple[str, str]]:
    """Return device, versions, data and hashes, by name."""
    cards, dataset = findings.scorecards, origins.dataset
    versions = {name: v for card in cards for name, v in card.versions.items()}
    rates = [card.copy_bytes_per_s / 1e9 for card in cards]
    test = dataset.files.get("test.json")
    conditions = [
        ("device", "; ".join(sorted({card.device for card in cards}))),
        ("copy bandwidth", f"{number(min(rates))}–{number(max(rates))} GB/s, read and written"),
        ("llava_ray", ", ".join(sorted({card.code_version for card in cards}))),
        *sorted(versions.items()),
        ("base model", findings.config.model.path),
    ]
    if origins.merged:
        conditions += [
            ("base model SHA-256", origins.merged.base_model_sha256),
            ("merged model", origins.merged.id),
        ]
    conditions += [
        ("data set", f"{dataset.id}, from {dataset.source}"),
        ("rows", f"{dataset.num_train} for training, {dataset.num_test} held out"),
        ("held-out split SHA-256", test.sha256 if test else "not in the manifest"),
        ("measured", f"{min(card.created for card in cards)} to "
                     f"{max(card.created for card in cards)}"),
    ]  # fmt: skip
    return conditions
