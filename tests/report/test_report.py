"""The report: every variant in it, self-contained, and nothing from outside is markup."""

import json
import re
from pathlib import Path

import pytest
from measured_run import FAILURES, SHAPES, SIGNS, make_config, make_scorecards

from llava_ray import choose
from llava_ray.artifacts.code_digest import code_digest
from llava_ray.artifacts.records import ChosenVariant
from llava_ray.artifacts.store import local_folder
from llava_ray.report import article
from llava_ray.report.columns import number, size_text


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def chosen(storage: Path) -> ChosenVariant:
    return choose.run(make_config(storage), make_scorecards(storage), list(FAILURES))


@pytest.fixture(scope="module")
def html(chosen: ChosenVariant) -> str:
    return (local_folder(chosen) / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def markdown(chosen: ChosenVariant) -> str:
    return (local_folder(chosen) / "report.md").read_text(encoding="utf-8")


def test_the_winner_and_every_reason_are_in_the_record(chosen: ChosenVariant) -> None:
    assert chosen.slug == "gguf-q4_k_m"
    assert set(chosen.against) == {shape[0] for shape in SHAPES} - {chosen.slug} | {"awq-w4-g128"}


def test_what_is_missing_is_said_first(
    chosen: ChosenVariant, html: str, markdown: str, tmp_path: Path
) -> None:
    total = len(SHAPES) + len(FAILURES)
    assert chosen.missing.startswith(f"1 of {total} variants failed: awq-w4-g128: ")
    assert markdown.splitlines()[0].startswith(f"**1 of {total} variants failed: awq-w4-g128")
    body = html.split("<main>")[1]
    assert body.strip().startswith(f'<p class="missing" role="alert">1 of {total} variants failed')
    whole = choose.run(make_config(tmp_path), make_scorecards(tmp_path), [])
    assert whole.missing == ""
    assert (local_folder(whole) / "report.md").read_text(encoding="utf-8").startswith("# ")


def test_every_method_of_the_article_has_a_row_with_its_figures(chosen: ChosenVariant) -> None:
    rows = json.loads((local_folder(chosen) / "report.json").read_text(encoding="utf-8"))["rows"]
    by_slug = {row["slug"]: row for row in rows}
    for slug, (size, rate) in article.TABLE.items():
        assert by_slug[slug]["article_size_gb"] == size
        assert by_slug[slug]["article_tokens_per_s"] == rate
    assert by_slug["awq-w4-g128"]["status"] == "failed"
    assert by_slug["awq-w4-g128"]["decode_tokens_per_s"] is None


def test_the_data_say_by_which_code_they_were_measured(chosen: ChosenVariant) -> None:
    tree = json.loads((local_folder(chosen) / "report.json").read_text(encoding="utf-8"))
    assert tree["code_digest"] == code_digest("quickstart_report")


def test_a_method_of_the_article_that_nobody_asked_for_says_so(tmp_path: Path) -> None:
    config, cards = make_config(tmp_path), make_scorecards(tmp_path)
    record = choose.run(config, [card for card in cards if card.slug != "bnb-nf4"], [])
    text = (local_folder(record) / "report.md").read_text(encoding="utf-8")
    assert "not asked for: add it to quantize.variants" in text.split("| bnb-nf4 |")[1][:400]


def test_html_needs_no_network(html: str) -> None:
    loaded = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', html)
    assert loaded and all(found.startswith(("data:image/jpeg;base64,", "#")) for found in loaded)
    assert "<script" not in html and "@import" not in html


def test_html_shows_figures_failures_and_answers(html: str) -> None:
    assert '121 <span class="range">(119–122)</span>' in html
    assert "in parallel took" in html and "one after the other they take 150 s" in html
    # 0.211 - 0.0349, with samples at 0.6, 1 and 1.4 of it.
    assert "+0.176 (+0.106 to +0.247)" in html
    assert "95%: 0.0279–0.0436" in html
    assert "needs &#39;pip install llava_ray[awq]&#39;" in html
    assert html.count("data:image/jpeg;base64,") == len(SIGNS)
    assert "<mark>&#34;OPEN</mark>" in html and "OPFN" in html


def test_text_from_outside_is_never_markup(html: str, markdown: str) -> None:
    assert "<b>not bold</b>" not in html and "&lt;b&gt;not bold&lt;/b&gt;" in html
    assert "<b>not bold</b>" not in markdown and "&lt;b&gt;not bold&lt;/b&gt;" in markdown


def test_pictures_follow_the_page_and_name_themselves(html: str) -> None:
    assert html.count('role="img" aria-label=') == 2
    assert "var(--ink)" in html and "fill: #1c2430" not in html
    ids = re.findall(r'<\w+[^>]* id="([^"]+)"', html)
    shared = {name for name in ids if ids.count(name) > 1}
    assert not {name for name in shared if re.match(r"[mp][0-9a-f]{8,}", name)}


def test_markdown_table_has_as_many_cells_in_every_line(markdown: str) -> None:
    table = markdown.split("## All variants\n\n")[1].split("\n\n")[0].splitlines()
    counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert len(counts) == 1 and len(table) == 2 + len(SHAPES) + len(FAILURES)


def test_markdown_pictures_lie_beside_it(chosen: ChosenVariant, markdown: str) -> None:
    names = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", markdown)
    assert len(names) == 2 and all((local_folder(chosen) / name).stat().st_size for name in names)


def test_the_command_of_a_row_is_a_config_that_loads(chosen: ChosenVariant, markdown: str) -> None:
    import shlex

    from llava_ray.config.run import load_config

    commands = re.findall(r"^llava-ray benchmark .*$", markdown, flags=re.MULTILINE)
    assert len(commands) == len(SHAPES) + len(FAILURES)
    folder = local_folder(chosen)
    for command in commands:
        _, _, _, name, override = shlex.split(command)
        config = load_config(folder / name, [override])
        assert config.benchmark.baseline in config.quantize.variants


def test_every_measured_variant_gets_a_card_with_its_hashes(
    storage: Path, chosen: ChosenVariant
) -> None:
    for slug, *_ in SHAPES:
        card = (local_folder(chosen) / "cards" / slug / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\npipeline_tag: image-text-to-text\n")
        assert f"# {slug}\n" in card and "SHA-256 `9a129038d9a00aed" in card
        beside = storage / "variant" / f"variant-{slug}"
        assert (beside / "README.md").read_text(encoding="utf-8") == card
        stamps = json.loads((beside / "passport.json").read_text(encoding="utf-8"))
        opens = {stamp["reader"] for stamp in stamps if stamp["verdict"] != "refuses"}
        assert ("llama.cpp" in opens) == slug.startswith("gguf")
        assert ("transformers-5" in opens) == slug.startswith(("none", "bnb", "awq"))


def test_a_second_call_finds_the_first(storage: Path, chosen: ChosenVariant) -> None:
    from llava_ray.artifacts.records import Scorecard
    from llava_ray.artifacts.store import ArtifactStore

    cards = ArtifactStore(str(storage)).find_all(Scorecard)
    assert choose.run(make_config(storage), cards, list(FAILURES)) == chosen


def test_models_of_megabytes_are_shown_in_megabytes(tmp_path: Path) -> None:
    record = choose.run(make_config(tmp_path), make_scorecards(tmp_path, factor=0.001), [])
    html = (local_folder(record) / "report.html").read_text(encoding="utf-8")
    assert ">MB</abbr>" in html and "size on disk, MB" in html
    assert '>4.70 <span class="range">(est. 4.65)</span>' in html


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.03491, "0.0349"), (121.4, "121"), (14127, "14,127"), (2e-7, "2.0e-07"),
     (9.996, "10.0"), (float("nan"), "nan"), (3.2e9, "3.2e+09")],
)  # fmt: skip
def test_numbers_read_well(value: float, text: str) -> None:
    assert number(value) == text


def test_sizes_carry_their_unit() -> None:
    sizes = (4.7e9, 2.5e6, 622)
    assert [size_text(size) for size in sizes] == ["4.70 GB", "2.50 MB", "0.622 kB"]
