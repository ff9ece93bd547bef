"""Which window comes when: every token once an epoch, one order for any number of processes, mixes in proportion."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import kronpress as kp
from kronpress.tokens import TokenStream, TrainData
from kronpress.tokens.order import Interleaved, ShuffledWindows, share
from kronpress.tokens.streams import Piece

seeds = st.integers(0, 2**32)
weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@st.composite
def streams(draw: Any) -> tuple[TokenStream, list[int], list[bool]]:
    """A stream of a few pieces, and its tokens and which of them count."""
    pieces, ids, counts = [], [], []
    for size in draw(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any)):
        some = draw(st.lists(st.integers(0, 2**15 - 1), min_size=size, max_size=size))
        marks = draw(st.lists(st.booleans(), min_size=size, max_size=size)) if draw(st.booleans()) else None
        stored = some if marks is None else [2 * token + mark for token, mark in zip(some, marks, strict=True)]
        pieces.append(Piece(np.array(stored, dtype=draw(st.sampled_from(["<u2", "<u4"]))), marks is not None))
        ids += some
        counts += marks or [True] * size
    return TokenStream(pieces), ids, counts


# ---- streams ----


@given(made=streams(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_stream_is_read_and_sliced_like_a_list_that_repeats(made, data):
    stream, ids, counts = made
    first = data.draw(st.integers(0, 3 * len(ids)))
    last = data.draw(st.integers(first, first + 2 * len(ids)))
    read_ids, read_counts = stream.read(first, last)
    places = [place % len(ids) for place in range(first, last)]
    assert (read_ids.dtype, read_counts.dtype) == (torch.int64, torch.bool)
    assert read_ids.tolist() == [ids[place] for place in places]
    assert read_counts.tolist() == [counts[place] for place in places]
    begin, end = (data.draw(st.none() | st.integers(-len(ids) - 2, len(ids) + 2)) for _ in range(2))
    part = stream[begin:end]
    assert part.read(0, len(part))[0].tolist() == ids[begin:end]
    assert (len(stream), stream.largest(), stream.counts()) == (len(ids), max(ids), any(counts))
    # Of equal tokens, however they are stored and divided.
    assert (
        stream.digest()
        == TokenStream.of(torch.tensor(ids)).digest()
        != TokenStream.of(torch.tensor([0, *ids])).digest()
    )


# ---- windows of one stream ----


@given(num_tokens=st.integers(1, 60), length=st.integers(1, 60), epochs=st.integers(1, 6), seed=seeds)
@settings(max_examples=200, deadline=None)
def test_every_token_is_in_every_epoch_exactly_once(num_tokens, length, epochs, seed):
    assume(num_tokens >= length)
    order = ShuffledWindows(num_tokens, length, seed)
    used = [order.number(place) for place in range(order.first(epochs))]
    assert sorted(used) == list(range(len(used)))  # each window once
    # Each token of each of the epochs once, whichever window it is in; and what the last window has beyond them.
    tokens = Counter(token for window in used for token in range(window * length, (window + 1) * length))
    assert set(tokens.values()) == {1}
    beyond = max(tokens) + 1 - epochs * num_tokens
    assert 0 <= beyond < length
    # An epoch's windows are used before those of the next.
    begun_in = [window * length // num_tokens for window in used]
    assert begun_in == sorted(begun_in)


@given(num_tokens=st.integers(1, 200), length=st.integers(1, 20), seed=seeds, places=st.lists(st.integers(0, 200)))
@settings(max_examples=100, deadline=None)
def test_a_place_has_the_same_window_whatever_was_asked_before(num_tokens, length, seed, places):
    assume(num_tokens >= length)
    order = ShuffledWindows(num_tokens, length, seed)
    assert [order.number(place) for place in places] == [
        ShuffledWindows(num_tokens, length, seed).number(place) for place in places
    ]


def test_epochs_and_seeds_have_orders_of_their_own():
    order, other = ShuffledWindows(1000, 10, 0), ShuffledWindows(1000, 10, 1)
    epochs = [
        [each.number(place) % 100 for place in range(100 * e, 100 * e + 100)] for each in (order, other) for e in (0, 1)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(sorted(epoch) == list(range(100)) != epoch for epoch in epochs)


# ---- mixes ----


@given(given_weights=weights, seed=seeds, num_items=st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_sets_take_turns_in_the_order_of_their_times(given_weights, seed, num_items):
    turns = Interleaved(given_weights, seed)
    taken = [turns.item(place) for place in range(num_items)]
    # Written differently: the first times of each set, in exact numbers, sorted.
    total = sum(map(Fraction, given_weights))
    times = sorted(
        ((count + Fraction(offset)) / (Fraction(weight) / total), number, count)
        for number, (weight, offset) in enumerate(zip(given_weights, turns.offsets, strict=True))
        for count in range(num_items + 1)
    )
    gaps = [float((later[0] - earlier[0]) / (1 + later[0])) for earlier, later in pairwise(times)]
    assume(min(gaps, default=1) > 1e-12)  # times that rounding could exchange
    assert taken == [(number, count) for _, number, count in times[:num_items]]
    assert turns.counts(num_items) == [[number for number, _ in taken].count(i) for i in range(len(given_weights))]


@given(given_weights=weights, seed=seeds, num_items=st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_a_mix_is_in_proportion_wherever_it_is_ended(given_weights, seed, num_items):
    counts = Interleaved(given_weights, seed).counts(num_items)
    assert sum(counts) == num_items
    for count, weight in zip(counts, given_weights, strict=True):
        assert abs(count - num_items * weight / sum(given_weights)) <= len(given_weights) + 1


@given(
    sizes=st.lists(st.integers(5, 40), min_size=2, max_size=3),
    seed=seeds,
    data=st.data(),
    num_windows=st.integers(1, 60),
)
@settings(max_examples=60, deadline=None)
def test_a_mix_gives_of_each_set_what_the_set_alone_gives(sizes, seed, data, num_windows):
    given_weights = tuple(data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes))))
    # Tokens that say which set they are of.
    parts = [torch.arange(size) + 1000 * number for number, size in enumerate(sizes)]
    mixed = TrainData(tuple(map(TokenStream.of, parts)), given_weights).windows(5, seed)
    windows = [mixed[index]["input_ids"] for index in range(num_windows)]
    for number, size in enumerate(sizes):
        own = [window % 1000 for window in windows if window[0] // 1000 == number]
        order = ShuffledWindows(size, 5, seed + 1_000_003 * number)
        expected = [
            torch.arange(5 * order.number(place), 5 * order.number(place) + 5) % size for place in range(len(own))
        ]
        assert [window.tolist() for window in own] == [window.tolist() for window in expected]


# ---- processes and resuming ----


@given(num_items=st.integers(0, 40), num_ranks=st.integers(1, 9))
def test_shares_put_together_are_the_step_and_almost_equal(num_items, num_ranks):
    items = range(7, 7 + num_items)
    shares = [share(items, rank, num_ranks) for rank in range(num_ranks)]
    assert list(chain(*shares)) == list(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(made=streams(), length=st.integers(1, 6), seed=seeds, per_step=st.sampled_from([4, 8]), step=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_one_two_and_four_processes_read_the_same_steps_and_any_can_begin_anywhere(made, length, seed, per_step, step):
    stream, ids, _ = made
    assume(len(ids) >= length)
    data = TrainData((stream,))
    whole = data.windows(length, seed)
    uninterrupted = [whole[index] for index in range(10 * per_step)]
    for num_ranks in (1, 2, 4):
        # Each process has its own windows, made anew at this step, as after a crash.
        joined = [
            window
            for rank in range(num_ranks)
            for windows in [data.windows(length, seed)]
            for index in share(range(step * per_step, (step + 1) * per_step), rank, num_ranks)
            for window in [windows[index]]
        ]
        for window, expected in zip(joined, uninterrupted[step * per_step :], strict=False):
            assert window.keys() == expected.keys()
            for name in window:
                torch.testing.assert_close(window[name], expected[name], rtol=0, atol=0)
    assert ("counted" in uninterrupted[0]) == stream.is_masked


def test_workers_of_a_data_loader_read_the_same_windows():
    windows = TrainData((TokenStream.of(torch.arange(103)), TokenStream.of(torch.arange(50) + 500)), (2, 1)).windows(
        5, 3
    )
    steps = [list(range(8 * step, 8 * step + 8)) for step in range(12)]
    alone, shared = (
        [batch["input_ids"] for batch in DataLoader(windows, batch_sampler=steps, num_workers=workers)]
        for workers in (0, 2)
    )
    torch.testing.assert_close(shared, alone, rtol=0, atol=0)
    assert len(windows) == 21 + 10


# ---- what was before ----


def former_order(num_sequences: int, seed: int) -> Any:
    """The order that plain tokens have always been healed in: one random order of whole windows after another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(num_sequences, generator=generator).tolist()


@given(num_tokens=st.integers(3, 80), length=st.integers(1, 9), seed=seeds)
@settings(max_examples=100, deadline=None)
def test_plain_tokens_keep_the_order_that_committed_results_have(num_tokens, length, seed):
    assume(num_tokens >= length)
    tokens = torch.arange(num_tokens, dtype=torch.int32)
    num_sequences = num_tokens // length
    expected = kp.tokens.pack(tokens, length).long()[list(islice(former_order(num_sequences, seed), 3 * num_sequences))]
    windows = TrainData.of(tokens).windows(length, seed)
    torch.testing.assert_close(torch.stack([windows[i]["input_ids"] for i in range(3 * num_sequences)]), expected)
    # With the rest carried over, up to the first window that has any of it.
    carried = TrainData((TokenStream.of(tokens),)).windows(length, seed)
    torch.testing.assert_close(
        torch.stack([carried[i]["input_ids"] for i in range(num_sequences)]), expected[:num_sequences]
    )


@pytest.mark.parametrize("only_whole", [True, False])
def test_less_than_a_window_is_refused(only_whole):
    data = TrainData((TokenStream.of(torch.arange(9)), TokenStream.of(torch.arange(4))), (1, 1), only_whole)
    with pytest.raises(kp.RequestError, match="4 tokens of text are less than one sequence of 5"):
        data.windows(5, 0)


# ---- stages ----


@given(made=streams(), num_read=st.integers(0, 60), num_needed=st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_a_later_stage_reads_what_follows_or_all_if_that_is_too_little(made, num_read, num_needed):
    stream, ids, _ = made
    (rest,) = TrainData((stream,)).after(num_read, num_needed).streams
    unread = ids[num_read:]
    assert rest.read(0, len(rest))[0].tolist() == (unread if len(unread) >= num_needed else ids)


def test_of_a_mix_each_set_goes_on_behind_its_share():
    data = TrainData((TokenStream.of(torch.arange(100)), TokenStream.of(torch.arange(30))), (3.0, 1.0))
    first, second = data.after(40, 40).streams
    assert (first.read(0, 1)[0].item(), second.read(0, 1)[0].item()) == (30, 10)
    # 100 − 75 is less than 45, and 30 − 25 less than 15.
    assert [len(stream) for stream in data.after(100, 60).streams] == [100, 30]
