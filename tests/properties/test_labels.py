"""Laws of the label algebra: sizes and sources agree with the arrays that they describe."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.structure import labels as L

SIZES = st.lists(st.integers(2, 4), min_size=1, max_size=3)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes=SIZES, chosen=st.integers(0, 2), grow=st.integers(1, 3))
def test_sources_of_a_product_are_those_of_a_reshaped_array(
    sizes: list[int], chosen: int, grow: int
) -> None:
    atoms = [L.Label(n) for n in sizes]
    atom = atoms[chosen % len(atoms)]
    changes = {atom: np.concatenate([np.arange(atom.size), np.full(grow, -1)])}
    old = np.arange(np.prod(sizes)).reshape(sizes)
    expected = np.concatenate(
        [
            old,
            np.full(
                [grow if i == chosen % len(atoms) else n for i, n in enumerate(sizes)],
                -1,
            ),
        ],
        chosen % len(atoms),
    )
    whole = L.product(atoms)
    assert np.array_equal(L.sources(whole, changes), expected.ravel())
    assert L.size(whole, changes) == expected.size
    places = L.positions(whole, atom, changes)
    assert places.shape == (atom.size + grow, expected.size // (atom.size + grow))
    assert (L.sources(whole, changes)[places[-grow:]] == -1).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes=SIZES, drop=st.integers(0, 1))
def test_sources_of_a_concatenation_shift_what_follows(
    sizes: list[int], drop: int
) -> None:
    atoms = [L.Label(n) for n in sizes]
    changes = {atoms[0]: np.delete(np.arange(sizes[0]), drop)}
    whole = L.concatenation(atoms)
    assert np.array_equal(
        L.sources(whole, changes), np.delete(np.arange(sum(sizes)), drop)
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(outer=st.integers(2, 4), inner=st.integers(2, 4), other=st.integers(2, 4))
def test_views_there_and_back_are_the_same_labels(
    outer: int, inner: int, other: int
) -> None:
    first, second = L.Label(outer * inner), L.Label(other)
    (flat,) = L.regroup([first, second], [outer * inner * other])
    again = L.regroup([flat], [outer, inner, other])
    assert [label.root.size for label in again] == [outer, inner, other]
    assert L.product(again[:2]).size == first.size
    assert list(L.atoms(first)) == [*L.atoms(again[0]), *L.atoms(again[1])]
    assert again[2].root is second.root


def test_what_cannot_agree_is_frozen_with_the_reason() -> None:
    six, product = L.Label(6), L.product([L.Label(2), L.Label(3)])
    L.unify(six, L.product([L.Label(3), L.Label(2)]))
    L.unify(six, product)
    assert all(atom.frozen is not None for atom in L.atoms(six))
    with pytest.raises(L.Conflict):
        L.unify(L.Label(2), L.Label(3))
    with pytest.raises(L.Conflict):
        L.split_product(L.Label(5), 2)


def test_equal_parts_of_a_split_stay_equal() -> None:
    whole = L.Label(8)
    left, right = L.split_sum(whole, 4)
    L.unify(left, right)
    (atom,) = set(L.atoms(whole))
    changes = {atom: np.array([0, 1, 2, 3, -1])}
    assert L.size(whole, changes) == 10
    assert L.sources(whole, changes).tolist() == [0, 1, 2, 3, -1, 4, 5, 6, 7, -1]
    assert L.positions(whole, atom, changes).tolist() == [
        [0, 5],
        [1, 6],
        [2, 7],
        [3, 8],
        [4, 9],
    ]
