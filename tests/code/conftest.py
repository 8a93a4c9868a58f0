"""Models of a few thousand parameters, built from a configuration: nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")

import pytest

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Large enough that the logits of a random model differ clearly and depend on what was said before.
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture
def small_model():
    """small_model("Qwen3", vocab_size=8): a random model of that family, always with the same weights."""
    import torch
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def build(family: str, seed: int = 0, **changes):
        config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model.eval()

    yield build
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def s3_endpoint():
    """A real HTTP server that speaks S3, on a free port of this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint, monkeypatch):
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    keys = [{"Key": o["Key"]} for o in client.list_objects_v2(Bucket="bucket").get("Contents", [])]
    if keys:
        client.delete_objects(Bucket="bucket", Delete={"Objects": keys})


EXACT = {
    "type": "string_check",
    "name": "exact",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
}


@pytest.fixture
def job_dict():
    """The least a job needs; callers change it."""
    return {
        "model": "tiny",
        "training_file": "train.jsonl",
        "validation_file": "validation.jsonl",
        "test_file": "test.jsonl",
        "method": {"type": "reinforcement", "reinforcement": {"grader": dict(EXACT)}},
    }


@pytest.fixture
def make_run(job_dict, tmp_path, monkeypatch):
    """make_run(files="s3://…"): a Run whose record was made by hand, in an empty home."""
    from tasks.billing import load_rate_card
    from tasks.home import Home
    from tasks.job import Job
    from tasks.run import Record, Run

    monkeypatch.chdir(tmp_path)

    def make(files: str | None = None, state: str = "home", **job):
        folder = tmp_path / state
        record = Record(
            id="ftjob-0123456789abcdef01234567",
            name="demo",
            created_at=1.0,
            openrft_version="0",
            job=Job.model_validate({**job_dict, **job}),
            files={},
            grader=EXACT,
            grader_sha256="0",
            rate_card=load_rate_card("openai"),
        )
        return Run(Home(files or str(folder), folder), record)

    return make
