"""Warm start: supervised fine-tuning on demonstrations, so that RFT has something to sample from."""

from __future__ import annotations

import json
import shutil
import time

from tasks.dataset import load_rows
from tasks.model import (
    base_source,
    build_base,
    load_model,
    load_tokenizer,
    seed_everything,
)
from tasks.results import Resolved, WarmStartResult
from tasks.run import Run
from tasks.train.checkpoint import seal, weights_sha256

# Supervised learning rates by size: ten to a hundred times those of RFT.
LEARNING_RATES = ((10_000_000, 2e-3), (200_000_000, 1e-4), (float("inf"), 1e-5))


def warm_start(run: Run) -> WarmStartResult:
    """Fine-tune the base on the job's demonstrations; loss on the assistant's tokens only."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import SFTConfig, SFTTrainer

    started = time.perf_counter()
    settings = run.job.warm_start
    assert settings is not None, "the job has no warm_start section"
    resolved = Resolved.model_validate(run.record.stages["validate"]["resolved"])
    seed_everything(run.job.seed, resolved.threads)
    if run.job.model == "tiny":
        build_base(run)
    tokenizer = load_tokenizer(run)
    model = load_model(base_source(run), resolved.device, training=True)
    rows = load_rows(run.dataset("demonstrations"))
    # Prompt and completion apart: TRL then masks the prompt without needing marks in the chat template.
    data = Dataset.from_dict(
        {
            "prompt": [row["messages"][:-1] for row in rows],
            "completion": [row["messages"][-1:] for row in rows],
        }
    )
    rate = settings.learning_rate
    if rate == "auto":
        rate = next(value for limit, value in LEARNING_RATES if resolved.parameters < limit)

    class Progress(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                metrics = {"warm_start/loss": float(logs["loss"])}
                run.emit("warm_start", step=state.global_step, steps=state.max_steps, metrics=metrics)

    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=data,
        callbacks=[Progress()],
        args=SFTConfig(
            output_dir=str(run.path("warm_start", ".partial")),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=min(settings.batch_size, resolved.micro_batch),
            gradient_accumulation_steps=-(
                -settings.batch_size // min(settings.batch_size, resolved.micro_batch)
            ),
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=0.05,
            adam_beta2=0.98,  # short runs: the default 0.999 remembers longer than they last
            completion_only_loss=True,
            max_length=None,
            seed=run.job.seed,
            bf16=resolved.device == "cuda",
            use_cpu=resolved.device == "cpu",
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            dataset_num_proc=None,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    outcome = trainer.train()
    folder = run.path("warm_start", ".partial", "model")
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    target = run.path("warm_start", "model")
    digest = weights_sha256(folder)
    seal(folder, target, {"weights_sha256": digest})
    shutil.rmtree(run.path("warm_start", ".partial"), ignore_errors=True)
    result = WarmStartResult(
        checkpoint=run.uri("warm_start", "model"),
        weights_sha256=digest,
        steps=outcome.global_step,
        trained_tokens=_trained_tokens(tokenizer, rows) * settings.epochs,
        loss=outcome.training_loss,
        seconds=time.perf_counter() - started,
    )
    run.path("warm_start", "report.json").write_text(json.dumps(result.model_dump(mode="json"), indent=1))
    run.publish("warm_start")
    return result


def _trained_tokens(tokenizer, rows):
    """Tokens of all demonstrations, prompts included, as supervised training is billed."""
    texts = tokenizer.apply_chat_template([row["messages"] for row in rows], tokenize=False)
    return sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
