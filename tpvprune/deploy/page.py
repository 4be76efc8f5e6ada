"""The report as one self-contained HTML page, and as Markdown. The only importer of jinja2."""

from __future__ import annotations

from dataclasses import fields
from importlib import resources
from os import PathLike
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from tpvprune import plots
from tpvprune.card import bounds, model_card, numbers, verdict
from tpvprune.comparison import METRICS
from tpvprune.deploy.story import Story, merged
from tpvprune.errors import PlanError
from tpvprune.files import write_text
from tpvprune.measures import Report, scored_on
from tpvprune.version import __version__

PAGE = "report.html"


def report_page(story: Story) -> str:
    """One HTML file with its style, figures and thumbnails in it: nothing is fetched, nothing runs.

    Figures need matplotlib (the `report` extra); without it the page says so in their place.

    Args:
        story: what to tell.

    Raises:
        PlanError: the report lacks a part.
    """
    _check(story)
    source = resources.files("tpvprune.deploy").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(source)
    final = next(name for name in ("recovered", "pruned") if story.report.get(name))
    return template.render(
        story=story,
        report=story.report,
        plan=story.plan,
        title=f"{story.name}, pruned",
        verdict=verdict(story.plan, story.report),
        numbers=numbers(story.report),
        bounds=bounds(story.report),
        figures=figures(story) if plots.available() else None,
        shapes=story.shapes(),
        final=final,
        scored_on=scored_on,
        metric_words={name: f"{words[0].upper()}{words[1:]}" for name, words in METRICS.items()},
        version=__version__,
    )


def _check(story: Story) -> None:
    lacking = [f"{field.name!r}" for field in fields(Report) if field.name not in story.report]
    if lacking:
        raise PlanError(
            f"the report of {story.name!r} lacks {', '.join(lacking)}; give all of it, as prune() measures it: "
            "found.report.to_json()"
        )


def figures(story: Story) -> dict[str, str]:
    """SVG by name, each in the colours of the page around it."""
    widths, macs = story.widths(), merged(story.macs())
    found = {
        "widths": plots.bars(merged(widths), "units", "widths") if widths else "",
        "macs": plots.bars(macs, "multiply-adds per example", "macs") if macs else "",
        "drift": plots.levels(story.drift(), "KL from the dense model in nats", "drift") if story.drift() else "",
    }
    scored = story.scored()
    found["scores"] = plots.histogram(*scored, "score of a unit", "scores") if scored else ""
    if story.comparison is not None:
        up = METRICS[story.comparison.metric]
        found["criteria"] = plots.lines(story.comparison.curves(), "share of the multiply-adds left", up, "criteria")
    return {name: svg for name, svg in found.items() if svg}


def markdown(story: Story) -> str:
    """The report as a model card.

    Raises:
        PlanError: the report lacks a part.
    """
    _check(story)
    return model_card(story.plan, story.source or {"class": story.name}, story.report)


def write_page(folder: str | PathLike[str]) -> Path:
    """Write `report.html` from what a run left in its folder.

    Raises:
        PlanError: the report or the plan is missing, damaged or of another version.
    """
    path = Path(folder) / PAGE
    write_text(path, report_page(Story.of(folder)))
    return path
