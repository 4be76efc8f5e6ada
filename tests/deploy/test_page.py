"""The report page: what it says is what the run's files say, and a browser has nothing to complain of."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import tpvprune as tp
from tests.helpers import built, plan_without, random_gone
from tests.test_cli import call
from tpvprune import plots
from tpvprune.deploy.examples import Changed, Example, thumbnail
from tpvprune.deploy.page import markdown, report_page, write_page
from tpvprune.deploy.story import Story, merged
from tpvprune.recipe import load_recipe, validate_recipe
from tpvprune.report import compare
from tpvprune.workflow import Run

VOID = {"meta", "link", "br", "img", "input"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose answers change: no recovery, and a budget that hurts."""
    place = tmp_path_factory.mktemp("run")
    for i, (image, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        if i == 120:
            break
        inside = place / "images" / f"class{label}"
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15.9).astype("uint8")).resize((32, 32)).save(inside / f"{i:03d}.png")
    args = {"in_chans": 1, "num_classes": 10, "channels": [16, 32, 48, 64]}
    recipe = validate_recipe(
        {
            "name": "mine <b>&",
            "model": {"name": "resnet18", "checkpoint": "builtin:digits_cnn.safetensors", "args": args},
            "data": {"images": str(place / "images"), "labels": "folders", "size": 32},
            "budget": {"macs": 0.2, "round_to": 1},
            "recover": {"finetune": None, "reconstruct": None},
        },
        "mine.yaml",
        (),
    )
    Run(recipe, place / "out").until("report")
    return place / "out"


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Checks that tags are closed in order, and keeps what is looked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_a_run_writes_one_page_that_needs_nothing_else(html: str) -> None:
    read = Reader(html)
    assert all(link.startswith(("data:", "#")) for link in read.links)
    assert not {"script", "iframe", "object"} & read.tags
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(read.ids) == len(set(read.ids))
    for reference in re.findall(r"(?:url\(|href=\")#([^)\"]+)", html):
        assert reference in read.ids
    assert not re.search(r"#01020[0-9]", html), "every stand-in colour is one of the page's"


def test_the_page_says_what_the_report_says(html: str, folder: Path) -> None:
    report, plan = json.loads((folder / "report.json").read_text()), tp.Plan.load(folder / "plan.json")
    cells = Reader(html).cells
    for model in ("before", "pruned"):
        for key in ("params", "macs"):
            assert f"{report[model][key]:,}" in cells
        assert f"{report[model]['metrics']['agreement']:.1%}" in cells
    assert f"{report['got']['macs']['share']:.1%}" in cells
    assert f"{report['asked']['macs']['at_most']:,}" in cells
    sizes = plan.graph.sizes(plan.keep)
    for name, shape in plan.graph.shapes.items():
        if len(shape) > 1 and sizes[name] != shape:
            at = cells.index(name.removesuffix(".weight"))
            assert cells[at + 1 : at + 3] == ["\u00d7".join(map(str, shape)), "\u00d7".join(map(str, sizes[name]))]
    assert all(name in cells and reason in cells for name, reason in plan.graph.skipped.items())
    assert "mine &lt;b&gt;&amp;" in html
    assert "<b>&" not in html
    for name in ("widths", "macs", "scores", "drift"):
        assert f'<figure id="figure-{name}"><svg viewBox=' in html


def test_changed_answers_are_shown_with_what_they_were(folder: Path, html: str) -> None:
    run = Run(load_recipe(str(folder / "recipe.yaml")), folder)
    images = torch.cat([images for images, _ in run.inputs.loader(run.inputs.images.measured)])
    small = tp.load(folder)
    with torch.no_grad():
        p, q = run.inputs.dense(images).double().log_softmax(1), small(images).double().log_softmax(1)
    changed = (p.argmax(1) != q.argmax(1)).nonzero().flatten()
    assert len(changed) > 0
    story = Story.of(folder)
    assert story.changed == len(changed)
    kl = (p.exp() * (p - q)).sum(1)
    wanted = sorted(changed.tolist(), key=lambda i: -kl[i])[:12]
    assert [e.number for e in story.examples] == wanted
    for example in story.examples:
        i = example.number
        assert (example.before, example.after) == (int(p[i].argmax()), int(q[i].argmax()))
        assert example.kl == pytest.approx(float(kl[i]), rel=1e-5)
        assert example.label == run.inputs.images.measured[i][1]
        assert example.image in html
    thumb = np.array(picture(story.examples[0].image).convert("L")) / 255
    scale = run.inputs.dense.pretrained_cfg
    shown = images[story.examples[0].number, 0] * scale["std"][0] + scale["mean"][0]
    assert np.abs(thumb - shown.numpy()).max() < 0.01, "the thumbnail is the image as it was"
    assert f"{len(changed)} of 60 images are answered otherwise" in html


def test_the_page_can_be_made_again_without_images_and_weights(folder: Path, tmp_path: Path, html: str) -> None:
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "report.html").unlink()
    assert write_page(tmp_path / "out").read_text(encoding="utf-8") == html
    for name in ("scores.safetensors", "examples.json", "recipe.yaml"):
        (tmp_path / "out" / name).unlink()
    less = write_page(tmp_path / "out").read_text(encoding="utf-8")
    Reader(less)
    assert 'id="figure-drift"' in less
    assert not any(f'id="{part}"' in less for part in ("figure-scores", "examples", "recipe"))


def test_report_writes_the_page_and_prints_markdown(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, html: str
) -> None:
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "report.html").unlink()
    code, told, _ = call(capsys, monkeypatch, "report", str(tmp_path / "out"))
    assert code == 0
    assert f"look at it: {tmp_path / 'out' / 'report.html'}" in told
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == html
    code, told, _ = call(capsys, monkeypatch, "report", str(tmp_path / "out"), "--markdown")
    assert code == 0
    assert told.strip() == (tmp_path / "out" / "README.md").read_text().strip() == markdown(Story.of(folder)).strip()
    assert "accuracy went from" in told
    assert str(folder.parent) not in told, "a card names no path of this machine"
    code, _, said = call(capsys, monkeypatch, "report", "quickstart_cnn", "--markdown")
    assert code == 2
    assert "run it first" in said


def test_without_matplotlib_the_page_says_how_to_get_the_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    text = report_page(Story.of(folder))
    Reader(text)
    assert "<svg" not in text
    assert "python -m pip install &#39;tpvprune[report]&#39;" in text or "pip install 'tpvprune[report]'" in text


def story(name: str = "conv_bn", **more: Any) -> Story:
    b = built(name)
    found = tp.prune(b.model, [b.inputs], tp.Budget(macs=0.7))
    return Story(name, found.plan, found.report.to_json(), found.scores, **more)


def test_a_story_is_told_by_the_plan_and_the_scores() -> None:
    b = built("residual")
    plan = plan_without(b.graph, random_gone(b.graph, 0))
    scores = tp.score(b.model, [b.inputs], b.graph)
    told = Story("x", plan, {"drift": {"predicted_kl": 0.5, "pruned_kl": None, "recovered_kl": 0.25}}, scores)
    assert told.widths() == [(g.id, g.units, int(plan.mask(g.id).sum())) for g in b.graph.groups]
    assert sum(before for _, before, _ in told.macs()) == b.graph.macs()
    assert sum(now for *_, now in told.macs()) == plan.macs
    kept, gone = told.scored()
    assert len(gone) == plan.removed
    assert sorted(kept + gone) == sorted(v for values in scores.values.values() for v in values.tolist())
    group = b.graph.groups[0].id
    assert set(scores.values[group][~plan.mask(group)].tolist()) <= set(gone)
    assert told.drift() == [("predicted", 0.5), ("measured, recovered", 0.25)]


@pytest.mark.parametrize("told", [report_page, markdown])
def test_a_report_that_lacks_parts_is_refused(told) -> None:
    whole = story()
    with pytest.raises(tp.PlanError, match=r"lacks 'asked', 'got', 'before', .*give all of it.*report\.to_json\(\)"):
        told(Story("m", whole.plan, {}, whole.scores))
    with pytest.raises(tp.PlanError, match="the report of 'm' lacks 'drift'; "):
        told(Story("m", whole.plan, {k: v for k, v in whole.report.items() if k != "drift"}))


def test_many_layers_are_drawn_by_their_parts() -> None:
    rows = [(f"stage{s}.{b}.conv{c}", 10, c) for s in range(3) for b in range(10) for c in range(2)]
    assert merged(rows, 100) == rows
    assert len(merged(rows, 40)) == 30
    assert merged(rows, 10) == [(f"stage{s}", 200, 10) for s in range(3)]


def test_a_model_without_classes_and_labels_has_a_page() -> None:
    told = story()
    assert 'id="figure-scores"' in report_page(told)
    told.report["drift"].update(dict.fromkeys(told.report["drift"]))
    text = report_page(told)
    Reader(text)
    assert "there is no KL" in text
    assert "figure-drift" not in text


def test_figures_draw_what_they_are_given() -> None:
    svg = plots.bars([("first", 10, 5), ("a.very.long.name.of.a.layer.indeed", 1000, 1000)], "units", "w")
    assert svg.startswith('<svg viewBox="')
    assert "first" in svg
    assert "…" in svg
    assert "var(--kept)" in svg
    assert "var(--gone)" in svg
    assert svg == plots.bars([("first", 10, 5), ("a.very.long.name.of.a.layer.indeed", 1000, 1000)], "units", "w")
    assert "(2 of nothing are not drawn)" in plots.histogram([1e-3, 1.0, 0.0], [0.0], "score", "s")
    assert "0.125" in plots.levels([("predicted", 0.125)], "KL", "d")
    plots.histogram([0.0], [], "score", "s")
    plots.levels([("measured", 0.0)], "KL", "d")


def picture(uri: str) -> Image.Image:
    head, data = uri.split(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_thumbnails_undo_the_normalisation() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    true = torch.rand(3, 20, 16, generator=torch.Generator().manual_seed(0))
    image = (true - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    seen = torch.tensor(np.array(picture(thumbnail(image, mean, std)))) / 255
    assert float((seen.permute(2, 0, 1) - true).abs().max()) <= 0.5 / 255 + 1e-6
    stretched = picture(thumbnail(torch.linspace(-3, 5, 16).view(1, 4, 4)))
    assert stretched.mode == "L"
    assert stretched.getextrema() == (0, 255)
    large = picture(thumbnail(torch.rand(3, 300, 200)))
    assert large.size == (64, 96)
    assert large.format == "JPEG"
    picture(thumbnail(torch.full((1, 4, 4), 7.0)))


def test_what_moved_most_is_kept() -> None:
    b = built("mlp")
    changed = Changed("other", most=2)
    reference = torch.eye(4) * 4
    answers = torch.roll(torch.eye(4), 1, 0) * torch.tensor([[1.0], [3.0], [2.0], [0.5]])
    changed(torch.rand(4, 1, 2, 2), reference, {"other": answers}, torch.tensor([0, 1, -1, 3]))
    changed(torch.rand(4, 1, 2, 2), reference, {"other": reference}, None)
    assert (changed.seen, changed.changed) == (8, 4)
    assert [e.number for e in changed.examples()] == [1, 2]
    assert [e.label for e in changed.examples()] == [1, None]
    assert Example(**json.loads(json.dumps(changed.examples()[0].to_json()))) == changed.examples()[0]
    none = Changed("x", most=0)
    compare({"x": b.model}, b.model, [b.inputs], each=none)
    assert none.to_json() == {"model": "x", "seen": 5, "changed": 0, "examples": []}


@pytest.fixture
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine; apt-get install chromium")
    with api.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def brightness(shot: bytes) -> float:
    return float(np.array(Image.open(io.BytesIO(shot)).convert("L")).mean())


def test_a_browser_shows_the_page_on_phone_and_desk_light_dark_and_printed(folder: Path, browser: Any) -> None:
    seen = {}
    for width, height in ((390, 844), (1200, 900)):
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab, said, asked = context.new_page(), [], []
            tab.on("console", lambda message, to=said: to.append(message.text))
            tab.on("pageerror", lambda error, to=said: to.append(str(error)))
            tab.on("request", lambda request, to=asked: to.append(request.url))
            tab.goto((folder / "report.html").as_uri())
            assert said == []
            assert [url for url in asked if not url.startswith("data:")] == [(folder / "report.html").as_uri()]
            overflow, broken, wide, texts = tab.evaluate(
                """() => [
                    document.documentElement.scrollWidth - document.documentElement.clientWidth,
                    [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
                    [...document.querySelectorAll('#numbers .scroll, #asked .scroll')]
                        .filter(t => t.scrollWidth > t.clientWidth).length,
                    [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height),
                ]"""
            )
            assert (overflow, broken, wide) == (0, 0, 0)
            assert min(texts) > 9, "letters of figures stay readable"
            seen[width, scheme] = brightness(tab.screenshot())
            tab.emulate_media(media="print")
            assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
            context.close()
    for width in (390, 1200):
        assert seen[width, "light"] > 200 > 90 > seen[width, "dark"]
    assert math.isfinite(sum(seen.values()))
