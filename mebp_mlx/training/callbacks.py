"""Callbacks of mlx-lm's trainer (mlx_lm.tuner.callbacks.TrainingCallback), called with the same keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Any object with on_train_loss_report(info), on_val_loss_report(info) or both; a missing method is not called.
Callback = Any
Send = Callable[[dict[str, float], int], Any]  # as in RunLog


def sender(callbacks: Sequence[Callback]) -> Send:
    """Returns a function that passes a run's numbers to the callbacks."""
    n_tokens = 0

    def send(numbers: dict[str, float], iteration: int) -> None:
        nonlocal n_tokens
        event = next(iter(numbers)).partition("/")[0]
        values = {name.partition("/")[2]: value for name, value in numbers.items()}
        if event == "train":
            n_tokens += int(values["n_tokens"])
            _call(callbacks, "on_train_loss_report", {**_of_training(values), "trained_tokens": n_tokens}, iteration)
        if event == "valid":
            info = {"val_loss": values["loss"], "val_time": values["seconds"], "val_accuracy": values["accuracy"]}
            _call(callbacks, "on_val_loss_report", info, iteration)

    return send


def _of_training(values: Mapping[str, float]) -> dict[str, Any]:
    return {
        "train_loss": values["loss"],
        "learning_rate": values.get("learning_rate"),
        "iterations_per_second": 1 / values["step_s"],
        "tokens_per_second": values["tokens_per_s"],
        "peak_memory": values["peak_bytes"] / 1e9,
    }


def _call(callbacks: Sequence[Callback], method: str, info: dict[str, Any], iteration: int) -> None:
    for callback in callbacks:
        if (call := getattr(callback, method, None)) is not None:
            call({"iteration": iteration, **info})
