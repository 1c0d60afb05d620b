"""Modules in the place of wandb and mlflow that write down what is called, by the signatures of their documents."""

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class Calls(list[tuple[str, Any]]):
    def named(self, name: str) -> list[Any]:
        return [what for called, what in self if called == name]


def fake_wandb(monkeypatch: pytest.MonkeyPatch, fails: Exception | None = None, sleeps: float = 0.0) -> Calls:
    """A wandb whose runs take what `log` gives them, after a while, or not."""
    calls = Calls()

    class Run:
        def __init__(self, name: str):
            self.id = name

        def define_metric(self, name: str, *, step_metric: str | None = None) -> None:
            calls.append(("define_metric", (name, step_metric)))

        def log(self, data: dict[str, Any], step: int | None = None) -> None:
            time.sleep(sleeps)
            if fails:
                raise fails
            calls.append(("log", data))

        def finish(self, exit_code: int | None = None) -> None:
            calls.append(("finish", exit_code))

    def init(**settings: Any) -> Run:
        calls.append(("init", settings))
        return Run(settings["id"] or "abc123")

    monkeypatch.setitem(sys.modules, "wandb", _module("wandb", init=init, Settings=SimpleNamespace))
    return calls


def fake_mlflow(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """An mlflow with a client that has no experiment yet; parameters cannot be said twice, as in the real one."""
    calls, said = Calls(), set[str]()

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> Any:
            return None

        def create_experiment(self, name: str) -> str:
            calls.append(("create_experiment", name))
            return "7"

        def create_run(self, experiment_id: str, run_name: str | None = None) -> Any:
            calls.append(("create_run", (experiment_id, run_name)))
            return SimpleNamespace(info=SimpleNamespace(run_id="f" * 32))

        def update_run(self, run_id: str, status: str | None = None) -> None:
            calls.append(("update_run", (run_id, status)))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(params) <= 100 and len(metrics) <= 1000
            names = {p.key for p in params}
            assert not names & said
            said.update(names)
            calls.append(("log_batch", (run_id, list(metrics), list(params))))

        def set_terminated(self, run_id: str, status: str | None = None) -> None:
            calls.append(("set_terminated", (run_id, status)))

    entities = _module(
        "mlflow.entities",
        Metric=lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, time=timestamp, step=step),
        Param=lambda key, value: SimpleNamespace(key=key, value=value),
    )
    monkeypatch.setitem(sys.modules, "mlflow", _module("mlflow", MlflowClient=MlflowClient, entities=entities))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return calls


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(names)
    module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment] - find_spec asks for one
    return module
