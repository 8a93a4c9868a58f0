"""Checkpoints are complete or absent, verified when read; the best are kept and the newest always."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import StageFailed
from tasks.results import CheckpointInfo
from tasks.store import MANIFEST, sha256_file
from tasks.train import checkpoint
from tasks.train.checkpoint import (
    best_of,
    describe,
    intact,
    name_of,
    newest_intact,
    prune,
    publish,
    seal,
    steps,
)
from tasks.train.ledger import FILE as LEDGER
from tasks.train.ledger import Ledger


def save(run, step: int, reward: float | None = 0.5, seconds: float = 1.0) -> None:
    """A sealed checkpoint of three small files, published."""
    partial = run.path("checkpoints", checkpoint.PARTIAL, str(step))
    (partial / "sub").mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"weights of %d" % step)
    (partial / "sub" / "more.bin").write_bytes(bytes([step % 256]) * 100)
    ledger = Ledger()
    ledger.add(step, "update", seconds)
    (partial / LEDGER).write_text(ledger.dumps())
    facts = {"step": step, "valid_reward": reward, "weights_sha256": checkpoint.weights_sha256(partial)}
    seal(partial, run.path("checkpoints", name_of(step)), facts)
    publish(run, step)


@pytest.fixture(params=["local", "s3"])
def run(request, make_run):
    if request.param == "local":
        return make_run()
    request.getfixturevalue("s3")
    return make_run("s3://bucket/home")


def warnings(run) -> list[str]:
    file = run.path("events.jsonl")
    lines = file.read_text().splitlines() if file.exists() else []
    return [event["message"] for event in map(json.loads, lines) if event["type"] == "warning"]


def on_another_machine(run) -> None:
    """Same store, but nothing of the run folder is here."""
    shutil.rmtree(run.folder)


def test_a_sealed_checkpoint_is_intact_and_described(run):
    save(run, 40, 0.75, 12.5)
    folder = run.path("checkpoints", "step-000040")
    assert intact(folder)
    assert not (folder / ".." / ".partial" / "40").exists()
    info = describe(run, 40)
    assert (info.step, info.valid_reward, str(info.billed_seconds)) == (40, 0.75, "12.500000")
    assert info.weights_sha256 == sha256_file(folder / "model.safetensors")
    assert info.uri == f"{run.home.files}/jobs/{run.id}/checkpoints/step-000040"
    assert newest_intact(run) == (40, folder)


def test_no_checkpoint_at_all(run):
    assert steps(run) == []
    assert newest_intact(run) is None


def damage_weights(folder):
    (folder / "model.safetensors").write_bytes(b"wrong")


def damage_length(folder):
    with (folder / "sub" / "more.bin").open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    "harm",
    [
        damage_weights,
        damage_length,
        lambda folder: (folder / LEDGER).unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text('{"files": {"model'),
        lambda folder: (folder / MANIFEST).write_text("{}"),
    ],
    ids=["weights", "longer", "ledger lost", "no manifest", "half a manifest", "empty manifest"],
)
def test_a_damaged_checkpoint_is_passed_over(make_run, harm):
    run = make_run()
    for step in (10, 20, 30):
        save(run, step)
    harm(run.path("checkpoints", name_of(30)))
    assert not intact(run.path("checkpoints", name_of(30)))
    assert newest_intact(run) == (20, run.path("checkpoints", name_of(20)))
    assert warnings(run) == ["checkpoint of step 30 is damaged or incomplete and is not used"]


def test_an_unsealed_folder_is_no_checkpoint(run):
    save(run, 10)
    left = run.path("checkpoints", checkpoint.PARTIAL, "checkpoint-20")
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert steps(run) == [10]
    assert newest_intact(run) == (10, run.path("checkpoints", name_of(10)))


def test_sealing_again_replaces_what_a_lost_attempt_left(make_run):
    run = make_run()
    save(run, 10, 0.1)
    damage_weights(run.path("checkpoints", name_of(10)))
    save(run, 10, 0.2)
    assert intact(run.path("checkpoints", name_of(10)))
    assert describe(run, 10).valid_reward == 0.2


def test_a_move_to_another_machine_fetches_the_newest(s3, make_run):
    run = make_run("s3://bucket/home")
    for step in (10, 20):
        save(run, step, step / 100)
    on_another_machine(run)
    assert steps(run) == [10, 20]
    found = newest_intact(run)
    assert found == (20, run.path("checkpoints", name_of(20)))
    assert (found[1] / "model.safetensors").read_bytes() == b"weights of 20"
    assert warnings(run) == []
    # The older one stays in the store and can still be named in the result.
    assert describe(run, 10).valid_reward == 0.1
    assert not run.path("checkpoints", name_of(10)).exists()


def test_a_copy_that_was_cut_off_is_completed_from_the_store(s3, make_run):
    run = make_run("s3://bucket/home")
    for step in (10, 20):
        save(run, step)
    folder = run.path("checkpoints", name_of(20))
    (folder / MANIFEST).unlink()
    (folder / "sub" / "more.bin").unlink()
    assert newest_intact(run) == (20, folder)
    assert intact(folder)


def test_an_upload_that_was_cut_off_is_passed_over(s3, make_run):
    run = make_run("s3://bucket/home")
    for step in (10, 20, 30, 40):
        save(run, step)
    on_another_machine(run)
    run.home.store.delete(f"{run.key}/checkpoints/{name_of(40)}/{MANIFEST}")
    run.home.store.delete(f"{run.key}/checkpoints/{name_of(30)}/model.safetensors")
    assert newest_intact(run) == (20, run.path("checkpoints", name_of(20)))
    assert [w.split()[3] for w in warnings(run)] == ["40", "30"]


def test_an_unreachable_store_is_not_taken_for_damage(s3, make_run, monkeypatch):
    """Going back to an older checkpoint because the network is down would bill the same steps twice."""
    run = make_run("s3://bucket/home")
    save(run, 10)
    on_another_machine(run)
    listed = run.home.store.names(f"{run.key}/checkpoints")
    monkeypatch.setattr(checkpoint, "steps", lambda run: [10])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert listed == ["step-000010"]
    with pytest.raises(StageFailed, match="cannot be reached"):
        newest_intact(run)


def kept(run) -> list[int]:
    assert steps(run) == sorted(
        int(name.removeprefix("step-")) for name in run.home.store.names(f"{run.key}/checkpoints")
    )
    local = [n for n in os.listdir(run.path("checkpoints")) if n.startswith("step-")]
    assert sorted(map(name_of, steps(run))) == sorted(local)
    return steps(run)


def test_prune_keeps_the_best_and_the_newest(run):
    for step, reward in ((10, 0.3), (20, 0.9), (30, 0.7), (40, 0.8), (50, 0.1)):
        save(run, step, reward)
    prune(run, 2)
    assert kept(run) == [20, 40, 50]
    prune(run, 1)
    assert kept(run) == [20, 50]
    save(run, 60, 0.95)
    prune(run, 1)
    assert kept(run) == [60]


def test_of_equals_prune_keeps_the_later_and_no_reward_ranks_last(make_run):
    run = make_run()
    for step, reward in ((10, None), (20, 0.5), (30, 0.5), (40, None), (50, None)):
        save(run, step, reward)
    prune(run, 1)
    assert kept(run) == [30, 50]


def test_pruning_step_by_step_is_pruning_at_the_end_but_for_the_newest(make_run):
    """What is deleted on the way is never something that would have been kept."""
    rewards = [0.2, 0.9, 0.4, 0.9, 0.1, 0.6, 0.3]
    run = make_run()
    for number, reward in enumerate(rewards, 1):
        save(run, number, reward)
        prune(run, 3)
    assert kept(run) == [2, 4, 6, 7]


REWARDS = st.lists(st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.5, 1.0])), min_size=1, max_size=8)


@given(REWARDS, st.randoms())
def test_best_of_is_the_latest_of_the_highest(rewards, random):
    infos = [
        CheckpointInfo(step=10 * n, uri="", weights_sha256="", valid_reward=reward, billed_seconds=0)
        for n, reward in enumerate(rewards)
    ]
    graded = [r for r in rewards if r is not None]
    expected = max(n for n, r in enumerate(rewards) if not graded or r == max(graded))
    random.shuffle(infos)
    assert best_of(infos).step == 10 * expected


def test_weights_hash_covers_every_shard(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"a")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"b")
    first = checkpoint.weights_sha256(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"c")
    assert checkpoint.weights_sha256(tmp_path) != first
