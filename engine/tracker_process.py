"""Program of the process that passes the metrics of a run to an experiment tracker, see ``engine.tracker``.

Argument: id of the process of the run. Standard input: JSON objects, one per line. The first one describes the run, see
``engine.tracker.build_tracker``; the others are points ``{"step": ..., "values": {...}}``, and the last one is
``{"finished": ...}``. Standard output: lines ``INFO text`` and ``WARNING text`` for the log of the run.

The process ends after the last object. If the process of the run is killed, it ends within ``SECONDS_AT_EXIT``.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

PROJECT = "flatten"  # name of the tracker's project, unless the tracker's own environment variable gives another one
SECONDS_AT_EXIT = 30.0  # maximum time from the end of the run to the end of this process
SECONDS_BETWEEN_CHECKS = 0.5
MAX_PARAMETERS = 100  # per request, a limit of MLflow
MAX_CHARACTERS = 6000  # per value of a parameter, a limit of MLflow


class TrackedRun(NamedTuple):
    """A run of a tracker: a description for the log, and the functions to add a point and to end the run."""

    description: str
    log: Callable[[int, dict[str, float]], None]
    end: Callable[[bool], None]


def start_wandb(run: dict) -> TrackedRun:
    import wandb

    project = os.environ.get("WANDB_PROJECT") or PROJECT
    started = wandb.init(
        project=project,
        id=run["id"],
        name=run["name"],
        group=run["group"],
        config=run["config"],
        dir=os.environ.get("WANDB_DIR") or run["folder"],
        resume="allow",
        allow_val_change=True,  # of the config, on resume
        settings=wandb.Settings(console="off", silent=True, disable_git=True),
    )
    # Update numbers are the axis, since wandb's own step only increases, but a resumed run may repeat updates.
    started.define_metric("*", step_metric="step")
    return TrackedRun(
        f"run {run['id']} of project {project}, {started.url or started.settings.sync_dir}",
        lambda step, values: started.log({"step": step, **values}),
        lambda finished: started.finish(exit_code=0 if finished else 1),
    )


def start_trackio(run: dict) -> TrackedRun:
    import trackio

    project, name = os.environ.get("TRACKIO_PROJECT") or PROJECT, f"{run['name']}-{run['id']}"
    started = trackio.init(
        project=project, name=name, group=run["group"], config=run["config"], resume="allow", embed=False
    )  # runs are identified by name
    return TrackedRun(
        f"run {name} of project {project}",
        lambda step, values: started.log(values, step=step),
        lambda finished: started.finish(),
    )


def start_mlflow(run: dict) -> TrackedRun:
    import mlflow
    from mlflow.entities import Metric, Param

    client = mlflow.MlflowClient()
    project = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    experiment = mlflow.set_experiment(project).experiment_id
    found = client.search_runs([experiment], f"tags.flatten_run = '{run['id']}'")
    tags = {"flatten_run": run["id"], "group": run["group"]}  # MLflow chooses the ids of runs itself
    started = found[0] if found else client.create_run(experiment, run_name=run["name"], tags=tags)
    number = started.info.run_id
    client.update_run(number, status="RUNNING")
    known = started.data.params  # cannot be changed
    parameters = [Param(key, str(value)[:MAX_CHARACTERS]) for key, value in run["config"].items() if key not in known]
    for first in range(0, len(parameters), MAX_PARAMETERS):
        client.log_batch(number, params=parameters[first : first + MAX_PARAMETERS])

    def log(step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        client.log_batch(number, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    return TrackedRun(
        f"run {number} of experiment {project}, {mlflow.get_tracking_uri()}",
        log,
        lambda finished: client.set_terminated(number, "FINISHED" if finished else "FAILED"),
    )


STARTS = {"wandb": start_wandb, "trackio": start_trackio, "mlflow": start_mlflow}


def read_objects(parent: int) -> Iterator[dict]:
    """Objects of standard input, until it is closed or the parent has ended: loader workers may keep the pipe open."""
    pending = b""
    while True:
        if select.select([0], [], [], SECONDS_BETWEEN_CHECKS)[0]:
            received = os.read(0, 1 << 16)
            if not received:
                return
            *lines, pending = (pending + received).split(b"\n")
            yield from map(json.loads, lines)
        elif os.getppid() != parent:
            return


def end_after_parent(parent: int) -> None:
    """Kill this process and its child processes ``SECONDS_AT_EXIT`` after the end of the parent, whatever they are doing."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_CHECKS)
    time.sleep(SECONDS_AT_EXIT)
    os.killpg(0, signal.SIGKILL)


def pass_on(objects: Iterator[dict], report: Callable[[str], None]) -> None:
    """Start the tracker's run, add all points and end it. Only the first failure to add a point is reported."""
    run = next(objects)
    tracked = STARTS[run["tracker"]](run)
    report(f"INFO {tracked.description}")
    has_failed = finished = False
    for entry in objects:
        if "finished" in entry:
            finished = entry["finished"]
            break
        try:
            tracked.log(entry["step"], entry["values"])
        except Exception as error:
            if not has_failed:
                report(f"WARNING a point was not added ({describe(error)}); the run continues, and so do the attempts")
            has_failed = True
    tracked.end(finished)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> None:
    parent = int(sys.argv[1])
    del sys.path[0]  # this directory, whose modules would hide others of the same names
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGQUIT"):  # the run saves its state first, then ends this process
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the tracker prints

    def report(line: str) -> None:
        os.write(output, f"{line}\n".encode(errors="backslashreplace"))

    threading.Thread(target=end_after_parent, args=(parent,), daemon=True).start()
    try:
        pass_on(read_objects(parent), report)
    except BaseException as error:  # whatever a tracker raises, even SystemExit
        report(f"WARNING {describe(error)}; the run continues without the tracker")
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
