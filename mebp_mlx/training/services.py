"""--report-to: one child process per service; only the child imports the service's library.

The libraries take tens of megabytes, which do not belong in a training budget, and some of them wait for the network.
If a service fails during a run, the failure is reported once and the run continues without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config import SERVICES
from ..errors import UserError
from ..system.feed import Feed, Take, serve

_START_S, _END_S = 120.0, 60.0  # time to log in, and to upload the remaining numbers


def check_installed(services: Sequence[str]) -> None:
    """Raises UserError for a service whose library is not installed; imports nothing."""
    for service in services:
        library = SERVICES[service]
        try:
            is_there = importlib.util.find_spec(library) is not None
        except ValueError:  # a module without a spec
            is_there = False
        if not is_there:
            raise UserError(f"--report-to {service}: {library} is not installed; pip install {library}")


class Services:
    """The services of a run, as a context manager. project: its name; folder: the run's; options: as JSON values.

    say: called with a line about a service that failed. Raises UserError, before anything is written, if a service
    does not start.
    """

    def __init__(
        self, services: Sequence[str], project: str, folder: Path, options: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self.say = say
        where = {"project": project, "name": folder.resolve().name, "folder": str(folder), "options": options}
        self.feeds = {name: Feed(["mebp_mlx.training.services"], {"service": name, **where}) for name in services}
        for name, feed in self.feeds.items():
            if not feed.started(_START_S):
                problem = feed.problem
                self.close(0.0)
                raise UserError(f"--report-to {name}: {problem}")

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(_END_S)

    def send(self, numbers: dict[str, float], iteration: int) -> None:
        """Sends numbers by name to every service that is still running."""
        for name, feed in list(self.feeds.items()):
            if not feed.send({"numbers": numbers, "iteration": iteration}):
                self.say(f"--report-to {name}: {feed.problem}; nothing more is sent to it, the run continues")
                del self.feeds[name]
                feed.close(0.0)

    def close(self, timeout_s: float) -> None:
        """Waits until everything is delivered, at most timeout_s per service."""
        for name, feed in self.feeds.items():
            feed.problem = None
            feed.close(timeout_s)
            if feed.problem is not None and timeout_s:
                self.say(f"--report-to {name}: {feed.problem}; its last numbers may be missing")
        self.feeds = {}


# The child


def _open(request: dict[str, Any]) -> tuple[Take, Callable[[], None]]:
    log, finish = _OPENERS[request["service"]](request)
    return lambda message: log(message["numbers"], message["iteration"]), finish


Log = Callable[[dict[str, float], int], Any]


def _wandb(request: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    import wandb

    run = wandb.init(project=request["project"], name=request["name"], dir=request["folder"], config=request["options"])
    return lambda numbers, iteration: run.log(numbers, step=iteration), run.finish


def _tensorboard(request: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(Path(request["folder"]) / "tensorboard"))

    def log(numbers: dict[str, float], iteration: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, iteration)

    return log, writer.close


def _trackio(request: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    import trackio

    trackio.init(project=request["project"], name=request["name"], config=request["options"])
    return lambda numbers, iteration: trackio.log(numbers, step=iteration), trackio.finish


def _swanlab(request: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    import swanlab

    swanlab.init(
        project=request["project"],
        experiment_name=request["name"],
        logdir=str(Path(request["folder"]) / "swanlog"),
        config=request["options"],
    )
    return lambda numbers, iteration: swanlab.log(numbers, step=iteration), swanlab.finish


_OPENERS = {"wandb": _wandb, "tensorboard": _tensorboard, "trackio": _trackio, "swanlab": _swanlab}


if __name__ == "__main__":
    serve(_open)
