"""Run a recipe in a folder, stage by stage, so that a second run goes on where the first one stopped.

Each stage writes its result into the folder whole or not at all, and is done once `stages.json` says so
for the same recipe sections, weights and earlier stages. Changing a key redoes the stages it matters to.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from tpvprune import report as reporting
from tpvprune.batches import Progress
from tpvprune.card import write_card
from tpvprune.checkpoint import ABOUT, load, save
from tpvprune.deploy.page import write_page
from tpvprune.deploy.story import EXAMPLES
from tpvprune.errors import ModelError
from tpvprune.files import sweep, write_text
from tpvprune.inputs import Inputs
from tpvprune.lock import only_run
from tpvprune.plan import Plan
from tpvprune.planning.graph import trace
from tpvprune.planning.latency import LatencyTable
from tpvprune.planning.widths import check_reachable
from tpvprune.processes import Crew, from_first, process
from tpvprune.recipe import Recipe
from tpvprune.recovering import Recovery, refitted
from tpvprune.runfolder import (
    PARTIAL,
    PRODUCTS,
    RECIPE,
    STAGES,
    check_folder,
    lacking,
    one_line,
    read_state,
    refuse_finished,
    stage_keys,
    write_state,
)
from tpvprune.schedule import hold_zeros, plan_for
from tpvprune.scores import Scores
from tpvprune.scoring.criteria import name_of, predicted_kl, score
from tpvprune.scoring.registry import criterion_named
from tpvprune.scoring.shares import kept_scores
from tpvprune.sections import SparsifySection
from tpvprune.stepping import drift_told
from tpvprune.surgery.removal import apply
from tpvprune.types import Graph, read_json

Log = Callable[[str], None]


class Run:
    """One recipe in one folder.

    Args:
        recipe: what to do.
        folder: where results go; made if missing. It must be empty or hold a run of the same recipe.
        progress: called as `progress(stage, done, total)`.
        log: receives one line at the end of each stage.

    Raises:
        RecipeError: the folder holds something else.
    """

    def __init__(
        self, recipe: Recipe, folder: str | Path, *, progress: Progress | None = None, log: Log | None = None
    ) -> None:
        self.recipe, self.folder, self.inputs = recipe, Path(folder), Inputs(recipe)
        self.progress, self.log = progress, log or (lambda line: None)
        self._crew = Crew()
        if not self._crew.leads:
            self.progress, self.log = None, lambda line: None
        self._tracing = 0.0  # seconds spent on tracing before the stage's own turn
        if self._crew.leads:
            check_folder(self.folder, recipe)

    def until(self, last: str) -> dict[str, Any]:
        """Do all stages up to `last` that are not done yet; what that stage says of itself.

        Of several processes the first does so, and the others their shares of its work; they tell nothing.

        Raises:
            TpvpruneError: whatever a stage raises; stages done before it stay done.
            RecipeError: another process is at work in the folder, or it holds a finished model of other settings.
            OSError: the folder cannot be written to.
        """
        if not self._crew.leads:
            self._crew.follow({"score": self._scored, "plan": self._planned, "distil": self._distilled})
            return {}
        with self._crew.led():
            return self._until(last)

    def _until(self, last: str) -> dict[str, Any]:
        keys = stage_keys(self.recipe, last)
        if self._todo(keys):
            with ExitStack() as stack:
                existed = self.folder.is_dir()
                if existed:  # before anything that takes long
                    stack.enter_context(only_run(self.folder))
                self._check_inputs(last)
                if not existed:
                    stack.enter_context(only_run(self.folder))
                self._do(keys)
        return dict(read_state(self.folder)[last]["told"])

    def _todo(self, keys: dict[str, str]) -> list[str]:
        """The stages from the first that is not done as the recipe says."""
        state = read_state(self.folder)
        stages = list(keys)
        undone = [s for s in stages if state.get(s, {}).get("key") != keys[s] or not self._has(s)]
        if undone and "recover" in state and self._has("recover") and undone[0] in STAGES[: STAGES.index("eval")]:
            refuse_finished(self.folder, undone[0], state.get(undone[0], {}).get("key") == keys[undone[0]])
        return stages[stages.index(undone[0]) :] if undone else []

    def _do(self, keys: dict[str, str]) -> None:
        sweep(self.folder)
        todo, state = self._todo(keys), read_state(self.folder)
        for stage in set(keys) - set(todo):  # a run may have been killed before it did
            self._forget(stage)
        if todo:
            write_text(self.folder / RECIPE, self.recipe.to_yaml())
        for stage in todo:
            for later in STAGES[STAGES.index(stage) :]:  # what was made before must not pass for current
                state.pop(later, None)
                if later in PRODUCTS:
                    self._path(later).unlink(missing_ok=True)
            write_state(self.folder, state)
            start = time.perf_counter()
            told = getattr(self, f"_{stage}")()
            spent = max(time.perf_counter() - start, self._tracing if stage == "trace" else 0.0)
            seconds = round(spent, 2)
            state[stage] = {"key": keys[stage], "seconds": seconds, "told": told}
            write_state(self.folder, state)
            self._forget(stage)  # not before it counts as done
            if stage != "report":
                self.log(f"{stage}: {one_line(told)} ({seconds:.1f} s)")

    def _forget(self, stage: str) -> None:
        for left in self.folder.glob(f"{stage}-*{PARTIAL}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)

    def _partial(self, stage: str, suffix: str = "") -> Path:
        """Where a stage keeps what it has done so far; under the key of its settings, until its end."""
        return self.folder / f"{stage}-{stage_keys(self.recipe, stage)[stage][:12]}{PARTIAL}{suffix}"

    def _check_inputs(self, last: str) -> None:
        """Open what is named, and see whether the budget can be met, before anything is written."""
        _ = self.inputs.dense
        if last != "trace" and self.recipe.model.checkpoint is None:
            self.log("no checkpoint is named, so that the weights are random; give model.checkpoint (--checkpoint)")
        if last != "trace":
            self.inputs.check()
        if STAGES.index(last) >= STAGES.index("plan"):
            name = name_of(self.inputs.criterion())
            check_reachable(self._traced, self.recipe.limits(), latency=self._latency, criterion=name)
            self.inputs.check_zeros()
        if STAGES.index(last) >= STAGES.index("recover"):
            self.inputs.check_distillation()

    @cached_property
    def _traced(self) -> Graph:
        done = read_state(self.folder).get("trace", {}).get("key") == stage_keys(self.recipe, "trace")["trace"]
        if done and self._has("trace"):
            return self.graph
        start = time.perf_counter()
        graph = trace(
            self.inputs.dense,
            self.inputs.example(),
            depth=self.recipe.plan.depth,
            seconds=self.recipe.plan.trace_seconds,
            progress=self.progress,
        )
        self._tracing = time.perf_counter() - start
        return graph

    @cached_property
    def _latency(self) -> LatencyTable | None:
        return self.inputs.latency(self._traced, self.progress)

    def _path(self, stage: str) -> Path:
        return self.folder / PRODUCTS[stage]

    def _has(self, stage: str) -> bool:
        return not lacking(self.folder, stage)

    @property
    def graph(self) -> Graph:
        """From the trace stage."""
        return Graph.load(self._path("trace"))

    @property
    def plan(self) -> Plan:
        """From the plan stage."""
        return Plan.load(self._path("plan"))

    def _trace(self) -> dict[str, Any]:
        graph = self._traced
        graph.save(self._path("trace"))
        return {
            "groups": len(graph.groups),
            "units": graph.units,
            "params": graph.params(),
            "macs": graph.macs(),
            "stays_whole": dict(graph.skipped),
        }

    def _scored(self) -> Scores:
        pool, dense = self.inputs.scored(), self.inputs.dense
        save = from_first(kept_scores(self._partial("score"), dense, "dense") if self._crew.leads else None)
        batches, criterion = self.inputs.dealt(pool), self.inputs.criterion()
        scores = score(dense, batches, self.graph, criterion, progress=self.progress, save=save)
        self.inputs.tell_skipped(pool)
        return scores

    def _score(self) -> dict[str, Any]:
        scores = self._crew.together("score", self._scored)
        scores.save(self._path("score"))
        sure = {k: v for k, v in scores.summary().items() if v is not None and k not in ("samples", "units")}
        return {
            "criterion": scores.criterion,
            "images": scores.samples,
            "skipped_images": len(self.inputs.scored().skipped),
            **{name: round(v, 4) if isinstance(v, float) else v for name, v in sure.items()},
        }

    def _planned(self) -> Plan:
        recipe = self.recipe
        plan = plan_for(
            self.inputs.dense,
            self.inputs.dealt(self.inputs.scored()),
            self.graph,
            recipe.limits(),
            criterion=self.inputs.criterion(),
            planning=recipe.planning(),
            scores=Scores.load(self._path("score")),
            latency=from_first(self._latency if self._crew.leads else None),
            progress=self.progress,
            save=self._partial("plan", ".json") if self._crew.leads else None,
            refit_with=recipe.closed_form(),
            refit_batches=self.inputs.loader(refitted(recipe, self.inputs.images.scored))
            if recipe.plan.refit
            else None,
        )
        return plan if recipe.sparsify is None else from_first(self._sparse(plan, recipe.sparsify))

    def _plan(self) -> dict[str, Any]:
        graph, plan = self.graph, self._crew.together("plan", self._planned)
        plan.save(self._path("plan"))
        made = plan.made_by.get("composed", [plan.made_by])
        by, chosen = made[-1], {"shrinkage": made[0]["shrinkage"]} if "shrinkage" in made[0] else {}
        zeros = {"zeros": plan.zeros, "sparsity": round(plan.sparsity, 4), "scored_by": by.get("criterion")}
        return {
            "removed": plan.removed,
            "of": graph.units,
            "params": plan.params,
            "macs": plan.macs,
            "share_of_params": round(plan.params / graph.params(), 4),
            "share_of_macs": round(plan.macs / graph.macs(), 4),
            **chosen,
            **drift_told(plan),
            **({**zeros, "images": by.get("samples", 0)} if plan.zeros else {}),
        }

    def _sparse(self, plan: Plan, section: SparsifySection) -> Plan:
        """A plan, and single weights of what it leaves held at zero."""
        pool, asked = self.inputs.scored(), section.model_dump(exclude={"criterion"})
        dense, batches = self.inputs.dense, self.inputs.dealt(pool)
        hold = partial(hold_zeros, dense, plan, batches, asked=asked, progress=self.progress)
        try:
            state = self._partial("plan") if self._crew.leads else None
            return hold(self.recipe.criterion_of_weights(len(pool)), save=state)
        except ModelError as error:
            if section.criterion is not None:
                raise
            if process()[1] > 1:  # those without a batch have not met it, and wait
                raise ModelError(f"{error}; or score single weights by magnitude, sparsify.criterion=l1") from error
            self.log(f"single weights are scored by magnitude: {error}")
            return hold(criterion_named("l1"))

    def _apply(self) -> dict[str, Any]:
        small = apply(self.inputs.dense, self.plan)
        save(small, self.folder / "pruned")
        return {"params": sum(p.numel() for p in small.parameters()), "folder": str(self.folder / "pruned")}

    def _recovery(self, partial: Path) -> Recovery:
        return Recovery(self.recipe, self.inputs, partial, self.progress, self.log)

    def _distilled(self) -> tuple[dict[str, Any], nn.Module]:
        # Where the first one's is: its name tells of times of files, which copies do not share.
        partial = from_first(self._partial("recover") if self._crew.leads else self.folder)
        return self._recovery(partial).distilled()

    def _recover(self) -> dict[str, Any]:
        told, small = self._recovery(self._partial("recover")).refitted(self.folder / "pruned")
        if self.recipe.distillation() is not None:
            told, small = self._crew.together("distil", self._distilled)
        save(small, self.folder)
        return told

    def _eval(self) -> dict[str, Any]:
        plan, state = self.plan, read_state(self.folder)
        measured = self.inputs.images.measured
        batches = self.inputs.loader(measured)
        predicted = None  # of single weights there is no prediction
        if not plan.zeros:
            criterion = self.recipe.criterion(len(measured))
            predicted = predicted_kl(criterion, self.inputs.dense, batches, plan, self.progress)
        recovered = bool(state["recover"]["told"]["steps"])
        changed = self.inputs.changed("recovered" if recovered else "pruned")
        scored = max(state[stage]["told"].get("images", 0) for stage in ("score", "plan"))
        sources = {id(pool.skipped): pool.skipped for pool in (self.inputs.images.scored, measured)}
        report = reporting.build(
            dense=self.inputs.dense,
            pruned=load(self.folder / "pruned").to(self.inputs.device),
            recovered=load(self.folder).to(self.inputs.device) if recovered else None,
            plan=plan,
            budget=self.recipe.limits(),
            batches=batches,
            predicted=predicted,
            latency=self._latency,
            latency_batch=self.recipe.latency.batch_size,
            seconds={stage: state[stage]["seconds"] for stage in STAGES if stage in state},
            data={
                "scored": scored,
                "skipped": sum(map(len, sources.values())),
                "measured_on": f"{self.inputs.images.measured.name}, images the scorer did not see",
                **{k: v for k, v in state["recover"]["told"].items() if k.endswith("_images") or k == "left_out"},
            },
            steps=[{"stage": stage, **state[stage]["told"]} for stage in STAGES if stage in state],
            each=changed,
            progress=self.progress,
        )
        told = report.to_json()
        write_text(self.folder / EXAMPLES, json.dumps(changed.to_json()))
        write_card(self.folder, plan, read_json(self.folder / ABOUT, "description")["model"], told)
        write_text(self._path("eval"), json.dumps(told, indent=1))  # last: it vouches for the two before
        return {"before": report.before.metrics, "pruned": report.pruned.metrics} | (
            {"recovered": report.recovered.metrics} if report.recovered else {}
        )

    def _report(self) -> dict[str, Any]:
        write_page(self.folder)
        return reporting.stored_report(self._path("eval"))
