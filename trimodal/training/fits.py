"""How the stages of a run, and its evaluation, fit in memory: as planned now, or as the checkpoint has it.

A resumed run keeps the micro-batches of its checkpoint, smaller ones than planned where it had run out of memory:
another split would round otherwise. It keeps them only while it is asked for the same: where a setting that a plan
depends on has changed (`memory.*`, the batch, the tasks, the kind of device ...), that stage is planned anew.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from trimodal.config import Config, TaskConfig, config_from_dict
from trimodal.errors import UserError
from trimodal.memory import devices
from trimodal.memory.devices import Fit
from trimodal.training import budget
from trimodal.training.budget import Plan
from trimodal.training.planner import Place, asked_of, plan_stages
from trimodal.training.run import Run
from trimodal.training.stage import active_tasks

Tasks = Mapping[str, Sequence[TaskConfig]]  # of each stage


def place_of(run: Run) -> Place:
    """Where the steps of `run` are planned to run."""
    return Place(run.device.type, run.precision.dtype, len(run.data.speakers), run.world.size,
                 budget.calibration(devices.device_name(run.device)))


def settings_of(run: Run, config: Config) -> Config:
    """`config`, whose model has as many words as that of `run`."""
    return dataclasses.replace(config, model=run.model.config)


def fit_stages(run: Run, tasks: Tasks, state: Mapping[str, Any] | None) -> None:
    """Give `run` the fit of each stage that `tasks` names and of its evaluation, and print them as they are used.

    Raises:
        OverBudget: nothing fits; names the knobs.
    """
    place, config = place_of(run), settings_of(run, run.config)
    kept = saved_fits(run, config, tasks, state)
    plans: dict[str, Plan] = run.world.on_main(lambda: plan_stages(config, tasks, place, kept))
    print(budget.format_plan(plans), flush=True)
    if state is not None and (anew := [name for name in plans if name in state["fits"] and name not in kept]):
        print(f"Planned anew, for settings other than the checkpoint's: {', '.join(anew)}")
    run.fits = {name: found.fit for name, found in plans.items()}
    run.fits_asked = asked_of(config, tasks, place)
    run.predicted_gib = {name: found.peak_bytes / devices.GIB for name, found in plans.items()}
    run.planned_fits = dict(run.fits)


def saved_fits(run: Run, config: Config, tasks: Tasks, state: Mapping[str, Any] | None) -> dict[str, Fit]:
    """The fits of a checkpoint that obey the settings of `config`: those that were asked for the same."""
    if state is None:
        return {}
    now, then = asked_of(config, tasks, place_of(run)), state.get("fits_asked") or _asked_then(run, state)
    return {name: Fit(**fit) for name, fit in state["fits"].items() if name in now and now[name] == then.get(name)}


def _asked_then(run: Run, state: Mapping[str, Any]) -> dict[str, str]:
    """For a checkpoint that does not say it: what its settings ask for, with these data on this machine."""
    try:
        config = config_from_dict(state["config"])
        return asked_of(config, {row.name: active_tasks(row, run.data)[0] for row in config.stages}, place_of(run))
    except UserError:  # a stage that these data hold nothing for
        return {}
