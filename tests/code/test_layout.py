"""How the house is built: names that hijack nothing, imports that run one way, a wheel without mlflow."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("flows", "tasks", "graders", "api")


def modules(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def imported_names(file: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, inside functions and TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_module_hijacks_an_installed_package(folder):
    """Prefect and accelerate put a script's folder first on the path: flows/datasets.py would be `datasets`."""
    taken = (set(sys.stdlib_module_names) | set(packages_distributions())) - {*PACKAGES, "deployments"}
    assert {"datasets", "mlflow", "calendar"} <= taken
    names = {p.stem for p in modules(folder)} | {p.parent.name for p in modules(folder)}
    assert not (names - {"__init__", "__main__"}) & taken


def test_the_folder_mlflow_is_no_package():
    assert (ROOT / "mlflow").is_dir()
    assert not list((ROOT / "mlflow").rglob("*.py"))


def test_the_wheel_never_holds_mlflow_or_tests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(PACKAGES) <= set(packages)
    assert not {"mlflow", "tests", "examples"} & set(packages)
    assert all((ROOT / package).is_dir() for package in packages)


def test_mlflow_is_the_real_one_from_the_repository_root():
    code = "import mlflow; print(mlflow.__file__ or list(mlflow.__path__))"
    found = run_python(code).strip()
    assert "site-packages" in found


def test_no_package_files_under_tests():
    assert not list((ROOT / "tests").rglob("__init__.py"))


FORBIDDEN = {
    "graders": {"tasks", "flows", "api", "prefect", "mlflow", "torch", "transformers", "trl"},
    "tasks": {"flows", "api"},
    "api": {"flows"},
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_run_one_way(folder):
    for file in modules(folder):
        wrong = imported_names(file) & FORBIDDEN[folder]
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(*names: str) -> set[str]:
    """Top-level packages that are in memory after importing these modules in a fresh process."""
    code = f"import json, sys\nfor n in {names!r}: __import__(n)\nprint(json.dumps(sorted({{m.split('.')[0] for m, v in sys.modules.items() if v is not None}})))"
    return set(json.loads(run_python(code).splitlines()[-1]))


def module_names(folder: str) -> list[str]:
    return [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in modules(folder)
    ]


def test_graders_load_nothing_of_the_chain():
    names = [n for n in module_names("graders") if "__main__" not in n and ".sandbox." not in n]
    assert "graders.spec" in names
    assert not loaded_by(*names) & FORBIDDEN["graders"]


def test_the_worker_and_its_stages_know_no_prefect_and_no_mlflow():
    stages = ["tasks.warm_start", "tasks.calibrate", "tasks.train.loop", "tasks.evaluate"]
    code = (
        "import json, sys\n"
        "import tasks.train.worker\n"
        "sys.modules['mlflow'] = None\n"  # as the worker does before it loads a stage
        f"for n in {stages!r}: __import__(n)\n"
        "print(json.dumps(sorted({m.split('.')[0] for m, v in sys.modules.items() if v is not None})))"
    )
    found = set(json.loads(run_python(code, TRL_DISABLE_TELEMETRY="1").splitlines()[-1]))
    assert {"torch", "trl"} <= found  # the list is real
    assert not found & {"prefect", "mlflow", "fastapi", "flows", "api", "great_expectations"}


def test_the_worker_starts_light():
    """What decides on stage and arguments must not wait for torch."""
    assert not loaded_by("tasks.train.worker") & {
        "torch",
        "transformers",
        "trl",
        "prefect",
        "mlflow",
        "numpy",
    }


def test_reading_a_job_needs_no_heavy_library():
    found = loaded_by("tasks.job", "tasks.store", "tasks.home", "tasks.run", "tasks.billing", "tasks.dataset")
    assert "pydantic" in found
    assert not found & {
        "torch",
        "transformers",
        "datasets",
        "mlflow",
        "prefect",
        "boto3",
        "great_expectations",
    }
