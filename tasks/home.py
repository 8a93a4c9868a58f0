"""Where OpenRFT keeps things, and the environment that the tools underneath must see.

`files` is the store (a folder or s3://…); `state` is a local folder for databases and scratch space.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tasks.store import Store, open_store

DEFAULT = ".openrft"


@dataclass(frozen=True)
class Home:
    files: str
    state: Path

    @property
    def store(self) -> Store:
        return open_store(self.files)

    def scratch(self, key: str) -> Path:
        """Local folder where `key` of the store is worked on; the store's own folder if it is local."""
        return (Path(self.files) if "://" not in self.files else self.state / "scratch") / key

    @property
    def tracking_uri(self) -> str:
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.state / 'mlflow.db'}"

    @property
    def artifacts(self) -> str:
        return f"{self.files}/mlflow" if "://" in self.files else (self.state / "mlflow").as_uri()


def open_home(given: str | None = None) -> Home:
    """`--home`, else OPENRFT_HOME, else ./.openrft. OPENRFT_STATE moves the local part of an s3:// home."""
    files = given or os.environ.get("OPENRFT_HOME") or DEFAULT
    if "://" in files:
        return Home(files.rstrip("/"), Path(os.environ.get("OPENRFT_STATE", DEFAULT)).absolute())
    folder = Path(files).expanduser().absolute()
    return Home(str(folder), folder)


def configure_environment(home: Home, quiet: bool = True) -> None:
    """Set what Prefect, MLflow, Great Expectations and Hugging Face read at import. Call it before them.

    Telemetry is off, nothing is fetched at run time, and all databases live in the home. Values that the
    user has set win, but for OPENRFT_HOME, which child processes inherit.
    """
    os.environ["OPENRFT_HOME"] = home.files
    os.environ["OPENRFT_STATE"] = str(home.state)
    prefect = home.state / "prefect"
    defaults = {
        "DO_NOT_TRACK": "1",
        "GX_ANALYTICS_ENABLED": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_CACHE": str(home.state / "cache" / "datasets"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": home.tracking_uri,
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{prefect / 'prefect.db'}",
        "PREFECT_HOME": str(prefect),
        # Runs log to Prefect's pages; the terminal belongs to the command line, unless asked for.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL" if quiet else "INFO",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "60",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # progress is ours to show
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
