"""Answer chat requests with deployed bundles: found by name, verified, loaded once, kept."""

from __future__ import annotations

import json
import secrets
import threading
from dataclasses import dataclass
from typing import Any

from tasks import aliases
from tasks.errors import StageFailed
from tasks.home import Home
from tasks.store import MANIFEST, get_folder

ALIASES = ("champion", "previous", "challenger")


@dataclass(frozen=True)
class Served:
    """A deployed model version as the outside names it."""

    id: str
    key: str
    created: int


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Loaded:
    model: Any
    tokenizer: Any
    stops: list[int]
    context: int


class Engine:
    """Models of one home. `pinned` maps extra names to store keys, to try a bundle before it is promoted."""

    def __init__(self, home: Home, pinned: dict[str, str] | None = None) -> None:
        self.home = home
        self.pinned = pinned or {}
        self.loaded: dict[str, Loaded] = {}
        self.lock = threading.Lock()  # one batch at a time: torch already uses every core for it

    def models(self) -> list[Served]:
        """`name` (its champion) and `name@alias` of everything deployed."""
        served = [Served(name, key, 0) for name, key in self.pinned.items()]
        store = self.home.store
        for name in store.names("models"):
            deployed = aliases.read(self.home, name)
            for alias, version in sorted(deployed.items(), key=lambda item: (item[0] != "champion", item)):
                key = f"models/{name}/{version}"
                if alias not in ALIASES or not store.exists(f"{key}/{MANIFEST}"):
                    continue
                created = int(json.loads(store.read(f"{key}/{MANIFEST}")).get("created", 0))
                names = [name, f"{name}@{alias}"] if alias == "champion" else [f"{name}@{alias}"]
                served += [Served(id, key, created) for id in names]
        return served

    def find(self, name: str) -> Served | None:
        return next((model for model in self.models() if model.id == name), None)

    def load(self, key: str) -> Loaded:
        """The bundle under `key`, checked against its manifest before it is used."""
        if key not in self.loaded:
            from tasks.model import load_model, load_tokenizer_from, stop_ids
            from tasks.resolve import detect_device

            folder = get_folder(self.home.store, key, self.home.scratch(key))
            tokenizer = load_tokenizer_from(str(folder))
            model = load_model(str(folder), detect_device()).eval()
            context = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)
            self.loaded[key] = Loaded(model, tokenizer, stop_ids(model, tokenizer), context)
        return self.loaded[key]

    def chat(
        self,
        key: str,
        messages: list[dict[str, Any]],
        *,
        n: int,
        temperature: float,
        max_tokens: int | None,
        seed: int | None,
        stop: list[str],
    ) -> tuple[int, list[Answer]]:
        """(prompt tokens, n answers). Raises ValueError when the prompt leaves no room for an answer."""
        import torch

        from tasks.model import encode
        from tasks.train.sampler import sample

        with self.lock:
            loaded = self.load(key)
            [prompt] = encode(loaded.tokenizer, [{"messages": messages}])
            room = loaded.context - len(prompt)
            if room < 1:
                raise ValueError(
                    f"This model's maximum context length is {loaded.context} tokens; "
                    f"your messages have {len(prompt)} tokens."
                )
            device = next(loaded.model.parameters()).device
            generator = torch.Generator(device=device)
            generator.manual_seed(seed if seed is not None else secrets.randbits(63))
            rows = sample(
                loaded.model,
                [prompt] * n,
                max_new_tokens=min(room, max_tokens or room),
                temperature=temperature,
                eos_ids=loaded.stops,
                pad_id=loaded.tokenizer.pad_token_id,
                generator=generator,
            )
        return len(prompt), [_answer(loaded, ids, stop) for ids in rows]


def _answer(loaded: Loaded, ids: list[int], stop: list[str]) -> Answer:
    text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    finish = "stop" if ids and ids[-1] in loaded.stops else "length"
    cuts = [position for s in stop if s and (position := text.find(s)) >= 0]
    if cuts:
        text, finish = text[: min(cuts)], "stop"
    return Answer(text, len(ids), finish)


def check_home(home: Home) -> None:
    """Raise StageFailed when nothing has been deployed that could be served."""
    if not Engine(home).models():
        raise StageFailed(f"{home.files}: no deployed model yet. `openrft run` a job first.")
