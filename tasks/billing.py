"""Rate cards and charges. All money is Decimal.

A charge's time is prorated by the second; `hundredth_hour` then rounds it half up to two decimals of
an hour, as OpenAI's invoices do (2 h 33 min → 2.55 h → 255.00 at 100 USD/h), `cents` rounds the money.
"""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import BadInput

CARDS = Path(__file__).parent.parent / "deployments" / "rate_cards"
_HUNDREDTH = Decimal("0.01")


class RateCard(BaseModel):
    """What an hour of training costs. A job keeps the card that it was started with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: int
    training_usd_per_hour: Decimal = Field(ge=0)
    rounding: Literal["hundredth_hour", "cents"]

    def charge(self, seconds: Decimal) -> Decimal:
        """USD on the invoice line for `seconds` of core loop."""
        if self.rounding == "hundredth_hour":
            hours = (seconds / 3600).quantize(_HUNDREDTH, ROUND_HALF_UP)
            return (hours * self.training_usd_per_hour).quantize(_HUNDREDTH, ROUND_HALF_UP)
        return self.exact(seconds).quantize(_HUNDREDTH, ROUND_HALF_UP)

    def exact(self, seconds: Decimal) -> Decimal:
        """USD of exactly `seconds`, not rounded: for live figures."""
        return seconds * self.training_usd_per_hour / 3600


def load_rate_card(name: str) -> RateCard:
    """A card by its name in deployments/rate_cards, or by its path. Raises BadInput."""
    import difflib

    import yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else CARDS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in CARDS.glob("*.yaml"))
        near = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean `{near[0]}`?" if near else f"Known cards: {', '.join(known)}."
        raise BadInput(f"budget.rate_card: no card {name!r}. {hint}")
    try:
        return RateCard.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise BadInput(f"{path}: not a rate card: {' '.join(str(error).split())}") from None
