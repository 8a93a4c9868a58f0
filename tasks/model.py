"""The job's model: where its weights are, its tokenizer, how prompts become tokens.

`tiny` is built in the run folder from the job's own text; anything else is read where it stands.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.dataset import load_rows, prompt_texts
from tasks.errors import BadInput
from tasks.store import get_folder

if TYPE_CHECKING:
    from tasks.run import Run

TINY = "tiny"


def base_source(run: Run) -> str:
    """Folder or hub id of the base weights; for `models:/name@alias` the bundle that it names."""
    model = run.job.model
    if model == TINY:
        return str(run.path("base"))
    if model.startswith("models:/"):
        from tasks.registry import bundle_key

        key = bundle_key(run.home, model.removeprefix("models:/"))
        return str(get_folder(run.home.store, key, run.home.scratch(key)))
    return model


def load_tokenizer(run: Run) -> Any:
    """The job's tokenizer with a chat template. Raises BadInput when the model has none."""
    if run.job.model == TINY:
        folder = run.path("base")
        if not (folder / "tokenizer.json").exists():
            from tasks.train.tiny import train_tokenizer

            train_tokenizer(prompt_texts(_tokenizer_files(run))).save_pretrained(folder)
            run.publish("base")
    return load_tokenizer_from(base_source(run))


def load_tokenizer_from(source: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    local = Path(source, "tokenizer_config.json")
    try:
        if local.is_file() and json.loads(local.read_text("utf-8")).get("tokenizer_class") in (
            "PreTrainedTokenizerFast",
            "TokenizersBackend",
        ):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source)  # needs no torch
        else:
            from transformers import AutoTokenizer  # loads torch

            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"model: {source!r} has no tokenizer that can be loaded: {_first_line(error)}"
        ) from None
    if tokenizer.chat_template is None:
        raise BadInput(f"model: {source!r} has no chat template; use an instruction-tuned model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_files(run: Run) -> list[Path]:
    """Text that a tokenizer may be trained on: never the held-out files."""
    return [run.dataset(split) for split in ("train", "demonstrations") if split in run.record.files]


def base_config(run: Run) -> dict[str, Any]:
    """The base model's config.json. Raises BadInput when the model cannot be found."""
    if run.job.model == TINY:
        from tasks.train.tiny import SHAPE, vocabulary_rows

        return {**SHAPE, "vocab_size": vocabulary_rows(load_tokenizer(run))}
    source = base_source(run)
    if Path(source, "config.json").is_file():
        config: dict[str, Any] = json.loads(Path(source, "config.json").read_text("utf-8"))
        return config
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise BadInput(f"model: {source!r} cannot be loaded: {_first_line(error)}") from None
    return config


def context_limit(run: Run) -> int:
    """Tokens of prompt and completion together."""
    return int(base_config(run).get("max_position_embeddings") or 2**31)


def start_source(run: Run) -> str:
    """Weights that RFT starts from: the warm start's, if the job has one, else the base. Builds `tiny`."""
    if run.job.warm_start is not None:
        key = f"{run.key}/warm_start/model"
        return str(get_folder(run.home.store, key, run.path("warm_start", "model")))
    if run.job.model == TINY and not run.path("base", "config.json").exists():
        build_base(run)
    return base_source(run)


def build_base(run: Run) -> None:
    from tasks.train.tiny import build_tiny

    build_tiny(prompt_texts(_tokenizer_files(run)), run.path("base"), run.job.seed)
    run.publish("base")


def load_model(source: str, device: str = "cpu", training: bool = False) -> Any:
    """The causal language model at a folder or hub id: float32 on CPU and for training, else bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if training or device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    return model.to(device)


def encode(tokenizer: Any, rows: list[dict[str, Any]]) -> list[list[int]]:
    """Prompt token ids of each row, ending where the assistant's answer begins."""
    texts = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], tokenize=False, add_generation_prompt=True
    )
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's and the generation config's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def seed_everything(seed: int, threads: int) -> None:
    """Fix every random state and the thread count: the number of threads decides the order of sums."""
    import numpy
    import torch

    torch.set_num_threads(threads)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # finds bugs in kernels, at a price per tensor
    )


def draw_rows(run: Run, split: str, count: int) -> list[dict[str, Any]]:
    """`count` rows of a split, chosen by the job's seed; all of them if there are fewer."""
    rows = load_rows(run.dataset(split))
    return rows if len(rows) <= count else random.Random(run.job.seed).sample(rows, count)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
