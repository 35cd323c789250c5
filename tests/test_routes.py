"""Every reader, every target and the base model: what is written is right, or nothing is written."""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggcl_fast.targets import TARGETS

from .engines import warm
from .hostile import places, with_values
from .hostile_gguf import HOSTILE_GGUF
from .routes import CHECKPOINTS, MODELS, PAIRS, ROUTES, Route, altered, contents, hold, trained


def refusal(data: bytes, base: bytes, route: Route) -> str:
    """What is said where a sound pair cannot be had by a route; nothing where it can."""
    is_tied = "output.weight" not in contents(base).tensors
    is_lora = data.startswith(b"algg") or b"adapter.lora.alpha" in data
    is_hf = data.startswith(b"algg") and trained(data).is_hf
    if route.to == "checkpoint" and is_lora:
        return "an adapter has neither optimizer state nor training counts"
    if route.to == "checkpoint" and b"training.epoch_count" in data:
        return "a checkpoint of training.file_version 0 has no place for training.file_version"
    if route.to == "adapter" and is_hf and not route.with_base:
        return "the rows are in Hugging Face's order"
    if route.to == "adapter" and route.with_base and route.token_embd and is_tied and not is_hf:
        return "llama.cpp cannot adapt tied embeddings"
    if route.to == "peft" and not route.with_base and not is_hf and trained(data).n_head == 0:
        return "found nothing that tells it (--base or --heads N[,N_KV] (heads=) tells the number of heads)"
    return ""


def test_every_option_of_every_target_has_a_route() -> None:
    for to, target in TARGETS.items():
        with_base = {True} if "base" in target.needs else {False, True} if "base" in target.takes else {False}
        token_embd = {True, False} if "token_embd" in target.takes else {True}
        expected = {(to, b, o, t) for b in with_base for o in target.outtypes for t in token_embd}
        assert {route for route in ROUTES if route.to == to} == expected


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: "-".join(map(str, route)))
def test_sound_files_become_what_the_reference_says(route: Route) -> None:
    warm()
    for data, base in PAIRS:
        said, expected = hold(data, base, route), refusal(data, base, route)
        assert expected in said
        assert bool(said) == bool(expected)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pair=st.sampled_from(PAIRS), route=st.sampled_from(ROUTES), rng=st.randoms(use_true_random=False))
def test_mutations_are_converted_right_or_refused(pair: tuple[bytes, bytes], route: Route, rng: random.Random) -> None:
    warm()
    hold(*altered(pair, route, rng), route, traced=True)


@pytest.mark.parametrize("to", ["adapter", "merged", "peft"])
@pytest.mark.parametrize(("value", "is_sound"), [(1e18, True), (3e38, False), (np.nan, True), (np.inf, True)])
def test_a_norm_too_large_for_its_type_is_refused(to: str, value: float, is_sound: bool) -> None:
    data, base = PAIRS[0]
    for index in (2, 3):  # A and B of the last norm
        n = places(data).records[index].nbytes // 4
        data = with_values(index, [value] * n, data)
    assert ("too large for F32" in hold(data, base, Route(to, with_base=True))) != is_sound


def test_a_bad_base_model_leaves_nothing_behind() -> None:
    routes = [route for route in ROUTES if route.with_base]
    for i, bad in enumerate(HOSTILE_GGUF.values()):
        said = hold(CHECKPOINTS[i % len(CHECKPOINTS)], bad.data(), routes[i % len(routes)])
        assert "base.gguf" in said


def test_a_base_model_is_no_checkpoint() -> None:
    for base in MODELS:
        assert "a base model" in hold(base, base, ROUTES[0])
