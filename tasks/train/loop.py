"""The training stage: sample, grade, update; validate and checkpoint on the way; resume exactly.

Runs in the worker process. Talks to the outside by files of the run folder only: events.jsonl,
checkpoints/, rollouts/.
"""

from __future__ import annotations

import shutil
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tasks.dataset import load_rows
from tasks.errors import StageFailed
from tasks.model import load_model, load_tokenizer_from, seed_everything, start_source
from tasks.results import Resolved, TrainingResult
from tasks.rollout import Rollout, grade_rollouts, refuse_broken_grader, roll_out
from tasks.run import Run
from tasks.train import checkpoint
from tasks.train.ledger import FILE as LEDGER
from tasks.train.ledger import Ledger
from tasks.train.rollouts import RolloutLog
from tasks.train.trainer import RFTTrainer

# Steps in a row without a single group whose rewards differ before training is called off.
PATIENCE_WITHOUT_SIGNAL = 50


class StepCallback(TrainerCallback):
    """Times each step, bills it, reports it; decides when to validate and save."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loop.step_started = time.perf_counter()
        self.loop.trainer.phase_seconds = {"sampling": 0.0, "grading": 0.0}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loop.bill_step(state.global_step)
        due = state.global_step % self.loop.resolved.eval_interval == 0
        control.should_evaluate = control.should_save = due or state.global_step == state.max_steps

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.loop.report_step(state.global_step, logs)


class WorkerTrainer(RFTTrainer):
    """RFTTrainer that validates and saves the way a job wants it."""

    loop: Loop

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.loop.validated != self.state.global_step:  # transformers asks once more when training ends
            self.loop.validate(self.state.global_step)
        return {"eval_reward": self.loop.valid_reward if self.loop.valid_reward is not None else float("nan")}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.loop.save(model, trial)

    def save_parts(self, model: Any, trial: Any) -> None:
        """Weights, optimizer, scheduler, random states, as transformers writes them; no model card."""
        super(GRPOTrainer, self)._save_checkpoint(model, trial)


class Loop:
    """One training attempt of a job: from its newest intact checkpoint, or from the start, to the end."""

    def __init__(self, run: Run, resolved: Resolved) -> None:
        self.run, self.job, self.resolved = run, run.job, resolved
        self.rows = load_rows(run.dataset("train"))
        self.validation_rows = load_rows(run.dataset("validation"))
        self.ledger = Ledger()
        self.rollouts = RolloutLog(run.path("rollouts"))
        self.valid_reward: float | None = None
        self.validated: int | None = None
        self.step_started = 0.0
        self.step_seconds: dict[str, float] = {}
        self.silent_steps = 0
        self.trainer: WorkerTrainer

    def __call__(self) -> TrainingResult:
        started = time.perf_counter()
        resume = checkpoint.newest_intact(self.run)
        shutil.rmtree(self.run.path("checkpoints", checkpoint.PARTIAL), ignore_errors=True)
        seed_everything(self.job.seed, self.resolved.threads)
        source = start_source(self.run)
        self.tokenizer = load_tokenizer_from(source)
        model = load_model(source, self.resolved.device, training=True)
        with self.run.load_grader() as self.grader:
            self.trainer = self._build(model)
            self.trainer.loop = self
            if resume is None:
                self.run.emit("training_started", step=0, steps=self.resolved.steps)
                self.validate(0)
                self.trainer.train()
            else:
                step, folder = resume
                self.ledger = Ledger.load(folder)
                self.valid_reward, self.validated = checkpoint.describe(self.run, step).valid_reward, step
                self.rollouts.truncate(step)
                checkpoint.publish(self.run, step)  # the attempt before may have been killed while it did so
                self.run.publish("rollouts")
                self.run.emit("training_started", step=step, steps=self.resolved.steps, resumed=True)
                if step < self.resolved.steps:
                    self.trainer.train(resume_from_checkpoint=str(folder))
        return self.result(time.perf_counter() - started)

    def _build(self, model: Any) -> WorkerTrainer:
        r, o = self.resolved, self.job.optimizer
        args = GRPOConfig(
            output_dir=str(self.run.path("checkpoints", checkpoint.PARTIAL)),
            max_steps=r.steps,
            per_device_train_batch_size=r.micro_batch,
            gradient_accumulation_steps=r.batch_size * r.group_size // r.micro_batch,
            num_generations=r.group_size,
            max_completion_length=r.max_completion_tokens,
            temperature=self.job.sampling.temperature,
            top_k=0,
            top_p=1.0,
            learning_rate=r.learning_rate,
            lr_scheduler_type="constant",
            loss_type=o.loss,
            beta=o.kl,
            epsilon=o.clip_low,
            epsilon_high=o.clip_high,
            max_grad_norm=o.max_grad_norm,
            seed=self.job.seed,
            bf16=r.device == "cuda",
            use_cpu=r.device == "cpu",
            gradient_checkpointing=False,
            disable_dropout=True,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=10**9,  # StepCallback decides
            save_strategy="steps",
            save_steps=10**9,
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        prompts = Dataset.from_dict(
            {"prompt": [row["messages"] for row in self.rows], "row": list(range(len(self.rows)))}
        )
        trainer = WorkerTrainer(
            model=model,
            reward_funcs=self.reward,
            args=args,
            train_dataset=prompts,
            eval_dataset=prompts.select(range(1)),  # never read: `evaluate` is ours
            processing_class=self.tokenizer,
            callbacks=[StepCallback(self)],
            prompt_epochs=r.n_epochs,
        )
        from transformers.trainer_callback import PrinterCallback, ProgressCallback

        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        return trainer

    def reward(
        self, prompts: Any, completions: Any, completion_ids: Any, row: list[int], **_: Any
    ) -> list[float | None]:
        """TRL's reward function: the job's grader, with its policy for what could not be graded."""
        stop = set(self.trainer.eos_token_ids)
        graded = [
            Rollout(
                row=index,
                sample=position % self.resolved.group_size,
                text=completion[0]["content"] if isinstance(completion, list) else completion,
                tokens=len(ids),
                truncated=not ids or ids[-1] not in stop,
                reward=None,
            )
            for position, (index, completion, ids) in enumerate(
                zip(row, completions, completion_ids, strict=True)
            )
        ]
        grade_rollouts(self.grader, self.rows, graded)
        step = self.trainer.state.global_step + 1
        refuse_broken_grader(graded, self.job.grading.max_error_share, f"step {step}")
        self.rollouts.add("train", step, graded, self.rows)
        invalid = self.job.grading.invalid_grade
        fallback = None if invalid == "drop" else float(invalid)
        return [fallback if r.reward is None else r.reward for r in graded]

    def bill_step(self, step: int) -> None:
        total = time.perf_counter() - self.step_started
        phases = dict(self.trainer.phase_seconds)
        phases["update"] = max(0.0, total - sum(phases.values()))
        for phase, seconds in phases.items():
            self.ledger.add(step, phase, seconds)
        self.step_seconds = phases

    def report_step(self, step: int, logs: dict[str, Any]) -> None:
        silent = float(logs.get("frac_reward_zero_std") or 0.0)
        self.silent_steps = self.silent_steps + 1 if silent == 1.0 else 0
        if self.silent_steps >= PATIENCE_WITHOUT_SIGNAL:
            raise StageFailed(
                f"step {step}: in {PATIENCE_WITHOUT_SIGNAL} steps no prompt had completions of different reward, "
                "so nothing can be learned. Look at rollouts/ and at the grader."
            )
        names = {
            "reward": "train/reward",
            "reward_std": "train/reward_std",
            "frac_reward_zero_std": "train/groups_without_signal",
            "loss": "train/loss",
            "grad_norm": "train/grad_norm",
            "entropy": "train/entropy",
            "kl": "train/kl",
            "learning_rate": "train/learning_rate",
            "completions/mean_length": "train/completion_tokens",
            "completions/clipped_ratio": "train/truncated_share",
        }
        metrics = {new: float(logs[old]) for old, new in names.items() if logs.get(old) is not None}
        metrics["train/ungraded_share"] = self.rollouts.ungraded_share(step)
        metrics |= {f"timing/{phase}_seconds": seconds for phase, seconds in self.step_seconds.items()}
        self.run.emit("step", step=step, steps=self.resolved.steps, metrics=metrics, billing=self._billing())

    def _billing(self) -> dict[str, float]:
        seconds = self.ledger.seconds
        return {"seconds": float(seconds), "usd": float(self.run.record.rate_card.exact(seconds))}

    def validate(self, step: int) -> None:
        """Mean reward on the validation file; greedy when eval_samples is 1. Leaves every random state alone."""
        started = time.perf_counter()
        samples = self.resolved.eval_samples
        rollouts = roll_out(
            self.trainer.accelerator.unwrap_model(self.trainer.model),
            self.tokenizer,
            self.grader,
            self.validation_rows,
            samples=samples,
            temperature=0.0 if samples == 1 else self.job.sampling.temperature,
            max_new_tokens=self.resolved.max_completion_tokens,
            seed=self.job.seed * 1_000_003 + step,
        )
        seconds = time.perf_counter() - started
        self.ledger.add(step, "validation", seconds)
        self.rollouts.add("valid", step, rollouts, self.validation_rows)
        rewards = [r.reward for r in rollouts if r.reward is not None]
        self.valid_reward = sum(rewards) / len(rewards) if rewards else None
        threshold = self.job.evaluation.pass_threshold
        metrics = {
            "valid/pass_rate": sum(r >= threshold for r in rewards) / len(rollouts),
            "valid/ungraded_share": 1 - len(rewards) / len(rollouts),
            "valid/completion_tokens": sum(r.tokens for r in rollouts) / len(rollouts),
            "timing/validation_seconds": seconds,
        }
        if self.valid_reward is not None:
            metrics["valid/reward"] = self.valid_reward
        self.validated = step
        self.run.emit("validation", step=step, metrics=metrics, billing=self._billing())

    def save(self, model: Any, trial: Any) -> None:
        """Write the checkpoint under a temporary name, seal it, publish it, drop what is not kept."""
        step = self.trainer.state.global_step
        self.rollouts.flush(step)
        self.trainer.save_parts(model, trial)
        partial = self.run.path("checkpoints", checkpoint.PARTIAL, f"checkpoint-{step}")
        (partial / "training_args.bin").unlink()  # a pickle with this machine's paths, and nothing reads it
        (partial / LEDGER).write_text(self.ledger.dumps(), "utf-8")
        self.tokenizer.save_pretrained(partial)
        facts = {
            "step": step,
            "valid_reward": self.valid_reward,
            "weights_sha256": checkpoint.weights_sha256(partial),
        }
        checkpoint.seal(partial, self.run.path("checkpoints", checkpoint.name_of(step)), facts)
        checkpoint.publish(self.run, step)
        self.run.publish("rollouts")
        checkpoint.prune(self.run, self.job.evaluation.keep_checkpoints)
        self.run.emit("checkpoint", **facts, billed_seconds=float(self.ledger.seconds))

    def result(self, seconds: float) -> TrainingResult:
        done = self.trainer.state.global_step or (checkpoint.steps(self.run) or [0])[-1]
        if done != self.resolved.steps:
            raise StageFailed(f"training ended at step {done} of {self.resolved.steps}")
        infos = [checkpoint.describe(self.run, step) for step in checkpoint.steps(self.run)]
        best = checkpoint.best_of(infos)
        return TrainingResult(
            steps=done,
            checkpoints=infos,
            best_step=best.step,
            weights_sha256=best.weights_sha256,
            billed_seconds=self.ledger.seconds,
            billed_by_phase=self.ledger.by_phase(),
            billed_usd=self.run.record.rate_card.charge(self.ledger.seconds),
            seconds=seconds,
        )


def train(run: Run) -> TrainingResult:
    """Train a job whose dataset has been validated."""
    torch.set_float32_matmul_precision("highest")
    return Loop(run, Resolved.model_validate(run.record.stages["validate"]["resolved"]))()
