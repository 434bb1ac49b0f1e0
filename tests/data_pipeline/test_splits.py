"""Splits by concept: components, names, shares."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triweave.data_pipeline.splits import SPLITS, fold_of, group_rows, normalise_text, split_of

KEY_SETS = st.lists(
    st.lists(st.integers(0, 25).map(lambda number: f"key {number}"), min_size=1, max_size=4), max_size=30
)


def components(rows: list[list[str]]) -> list[int]:
    """Number the components of rows by spreading each row's number until nothing changes."""
    numbers = list(range(len(rows)))
    changed = True
    while changed:
        changed = False
        for one in range(len(rows)):
            for other in range(len(rows)):
                if numbers[one] != numbers[other] and set(rows[one]) & set(rows[other]):
                    numbers[one] = numbers[other] = min(numbers[one], numbers[other])
                    changed = True
    return numbers


@given(KEY_SETS)
def test_groups_are_the_connected_components(rows: list[list[str]]) -> None:
    groups, numbers = group_rows(rows), components(rows)
    pairs = Counter(zip(groups, numbers, strict=True))
    assert len(pairs) == len(set(groups)) == len(set(numbers))


@given(KEY_SETS, st.randoms(use_true_random=False))
def test_names_depend_on_no_order(rows: list[list[str]], random) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = [random.sample(rows[number], len(rows[number])) for number in order]
    groups = group_rows(rows)
    assert group_rows(shuffled) == [groups[number] for number in order]


@given(KEY_SETS)
def test_no_key_crosses_a_split_or_a_fold(rows: list[list[str]]) -> None:
    places = defaultdict(set)
    for keys, group in zip(rows, group_rows(rows), strict=True):
        for key in keys:
            places[key].add((split_of(group), fold_of(group, 5)))
    assert all(len(found) == 1 for found in places.values())


def test_a_long_chain_is_one_group_named_for_its_smallest_key() -> None:
    chain = [[f"{number:06d}", f"{number + 1:06d}"] for number in range(50_000)]
    assert set(group_rows(chain[::-1])) == set(group_rows([["000000"]]))


def test_a_row_without_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="without keys"):
        group_rows([["a"], []])


def test_shares_are_near_what_they_should_be() -> None:
    groups = group_rows([[f"concept {number}"] for number in range(20_000)])
    counts = Counter(map(split_of, groups))
    assert set(counts) == set(SPLITS)
    assert counts["validation"] / 20_000 == pytest.approx(0.05, abs=0.006)
    assert counts["test"] / 20_000 == pytest.approx(0.15, abs=0.01)
    folds = Counter(fold_of(group, 5) for group in groups)
    assert sorted(folds) == [0, 1, 2, 3, 4]
    assert max(folds.values()) - min(folds.values()) < 400
    tested = [group for group in groups if split_of(group) == "test"]
    within = Counter(fold_of(group, 5) for group in tested)
    assert min(within.values()) > 0.15 * len(tested), "folds are dealt apart from splits"
    with pytest.raises(ValueError, match="folds 0"):
        fold_of("a", 0)


def test_splits_of_named_groups_never_change() -> None:
    """A change here would move the held-out concepts of every corpus that was built before."""
    (group,) = group_rows([["text:a cat", "bytes:00"]])
    assert group == group_rows([["bytes:00"]])[0] == "e3f7089c99581674"
    names = [f"{number:016x}" for number in range(40)]
    assert [number for number, name in enumerate(names) if split_of(name) == "test"] == [5, 10, 14, 22, 23]
    assert [number for number, name in enumerate(names) if split_of(name) == "validation"] == [31, 37]
    assert [fold_of(name, 5) for name in names[:12]] == [2, 1, 4, 2, 3, 0, 2, 4, 2, 3, 2, 4]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  A small,\tGREY cat. ", "a small grey cat"),
        ("snake_case & more", "snake case more"),
        ("Straße ﬁn", "strasse fin"),
        ("Cafe\u0301", "café"),
        ("हिन्दी।", "हिन्दी"),
        ("小鳥、ﾄﾘ", "小鳥 トリ"),
        ("№ 5½", "no 51 2"),
        ("...", ""),
    ],
)
def test_normalised_text(text: str, normal: str) -> None:
    assert normalise_text(text) == normal


@given(st.text())
def test_normalising_leaves_one_space_between_words(text: str) -> None:
    normal = normalise_text(text)
    assert normal == " ".join(normal.split())
    assert normalise_text(f" -{text}! ") == normal
