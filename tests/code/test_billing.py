"""Rate cards: what an hour costs, how it is rounded, what is said of a bad card."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.billing import CARDS, RateCard, load_rate_card
from tasks.errors import BadInput


def card(rounding: str = "hundredth_hour", price: str = "100") -> RateCard:
    return RateCard.model_validate(
        {"name": "x", "version": 1, "training_usd_per_hour": price, "rounding": rounding}
    )


@pytest.mark.parametrize(
    ("seconds", "usd"),
    [
        (6480, "180.00"),  # 1.8 hours
        (9180, "255.00"),  # 2 h 33 min
        (3600, "100.00"),
        (0, "0.00"),
        (17.999999, "0.00"),
        (18, "1.00"),  # half of a hundredth of an hour rounds up
        (53.999999, "1.00"),
        (54, "2.00"),
    ],
)
def test_two_decimals_of_an_hour(seconds, usd):
    charge = card().charge(Decimal(str(seconds)))
    assert str(charge) == usd


@pytest.mark.parametrize(
    ("seconds", "usd"), [(3600, "100.00"), (0.179, "0.00"), (0.18, "0.01"), (60, "1.67"), (6480, "180.00")]
)
def test_cents(seconds, usd):
    assert str(card("cents").charge(Decimal(str(seconds)))) == usd


@given(st.decimals(0, 10**7, places=6), st.sampled_from(["hundredth_hour", "cents"]))
def test_a_charge_is_money_and_close_to_the_exact_price(seconds, rounding):
    price = card(rounding, "37.50")
    charge = price.charge(seconds)
    assert charge == round(charge, 2)
    exact = seconds * Decimal("37.50") / 3600
    assert price.exact(seconds) == exact
    limit = Decimal("0.005") * (Decimal("37.50") if rounding == "hundredth_hour" else 1) + Decimal("0.005")
    assert abs(charge - exact) <= limit


@given(st.decimals(0, 10**6, places=3), st.decimals(0, 10**6, places=3))
def test_more_time_never_costs_less(a, b):
    low, high = sorted((a, b))
    assert card().charge(low) <= card().charge(high)


def test_shipped_cards_load():
    names = sorted(p.stem for p in CARDS.glob("*.yaml"))
    assert "openai" in names
    for name in names:
        assert isinstance(load_rate_card(name).training_usd_per_hour, Decimal)
    openai = load_rate_card("openai")
    assert openai.training_usd_per_hour == 100
    assert openai.rounding == "hundredth_hour"


def test_a_card_by_path_keeps_its_price_to_the_cent(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nversion: 3\ntraining_usd_per_hour: 0.1\nrounding: cents\n")
    loaded = load_rate_card(str(file))
    assert loaded.training_usd_per_hour == Decimal("0.1")
    with pytest.raises(ValueError, match="frozen"):
        loaded.version = 4


def test_unknown_card_names_the_nearest():
    with pytest.raises(BadInput, match="Did you mean `openai`"):
        load_rate_card("openia")
    with pytest.raises(BadInput, match=r"Known cards: .*openai"):
        load_rate_card("zzzzzz")
    with pytest.raises(BadInput, match="no card"):
        load_rate_card("nowhere/card.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "name: x\nversion: 1\ntraining_usd_per_hour: much\nrounding: cents\n",
        "name: x\nversion: 1\ntraining_usd_per_hour: 1\nrounding: up\n",
        "name: x\nversion: 1\ntraining_usd_per_hour: 1\nrounding: cents\nextra: 1\n",
        "name: x\nversion: 1\ntraining_usd_per_hour: -5\nrounding: cents\n",
        "name: x\nversion: 1\ntraining_usd_per_hour: .nan\nrounding: cents\n",
        "- not a mapping\n",
        "",
        "{ broken",
    ],
)
def test_a_bad_card_is_bad_input_with_its_path(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(BadInput, match=r"mine\.yaml: not a rate card"):
        load_rate_card(str(file))
