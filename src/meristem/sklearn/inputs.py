"""From a table as people have it to the numbers that a net reads: categories become
indicators, missing numbers the mean and an indicator, all of it standardised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.validation import (
    _check_feature_names,
    _check_n_features,
    check_array,
    validate_data,
)
from torch import Tensor

FAR = 10.0
"""Standard deviations at which inputs are cut off: one rare value of 70 would throw the
weights of a whole batch about.
"""
# How data frames call columns of categories.
_CATEGORIES = ("category", "object", "string", "str", "Categorical", "Enum", "String")


def is_frame(x: Any) -> bool:
    """Whether a table is a data frame: it has named columns, each of a type of its own."""
    return hasattr(x, "columns") and hasattr(x, "dtypes")


def read(estimator: Any, x: Any, *, reset: bool) -> Any:
    """A table with its columns checked: the data frame itself, or an array of floats.

    Missing values may be in it; infinite ones may not.
    """
    if is_frame(x) and (reset or getattr(estimator, "_of_frames", False)):
        _check_feature_names(estimator, x, reset=reset)
        _check_n_features(estimator, x, reset=reset)
        if len(x) < 1:
            check_array(np.empty((0, 1)))
        return x
    rows = validate_data(
        estimator,
        x,
        reset=reset,
        dtype=np.float64,
        accept_sparse="csr",
        ensure_all_finite="allow-nan",
    )
    return rows.toarray() if sparse.issparse(rows) else rows


def categories(x: Any, chosen: Any) -> list[Any]:
    """The columns of categories: those that were named, or those whose type says so."""
    if chosen is None:
        return []
    if not isinstance(chosen, str):
        return list(chosen)
    if not is_frame(x):
        return []
    return [name for name in x.columns if str(x[name].dtype).startswith(_CATEGORIES)]


class Columns:
    """What turns the columns of a table into standardised inputs.

    Attributes:
        scaler: The scaler of all inputs.
    """

    def __init__(self, chosen: Any) -> None:
        self._chosen = chosen

    def fit(self, x: Any, weights: NDArray[Any]) -> Columns:
        """Learn the categories, means and scales of a table."""
        named = categories(x, self._chosen)
        self._encoder: Any = None
        missing = not is_frame(x) and bool(np.isnan(x).any())
        if named or is_frame(x) or missing:
            numbers = SimpleImputer(add_indicator=True, keep_empty_features=True)
            one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
            self._encoder = ColumnTransformer(
                [("categories", one_hot, named)],
                remainder=make_pipeline(numbers),
                sparse_threshold=0,
            )
            x = self._encoder.fit_transform(x)
        x = self._numbers(x)
        self.scaler = StandardScaler().fit(x, sample_weight=weights)
        self.count = x.shape[1]
        return self

    def _numbers(self, x: Any) -> NDArray[np.float64]:
        found: NDArray[np.float64] = check_array(x, dtype=np.float64)
        return found

    def inputs(self, x: Any) -> Tensor:
        """The inputs of a net, (rows, `count`), in standard deviations, far ones cut off."""
        if self._encoder is not None:
            x = self._encoder.transform(x)
        scaled = np.clip(self.scaler.transform(self._numbers(x)), -FAR, FAR)
        return torch.tensor(scaled, dtype=torch.float32)


def kept(x: Any, rows: NDArray[np.bool_]) -> Any:
    """Some rows of a table."""
    if bool(rows.all()):
        return x
    if hasattr(x, "loc"):
        return x.loc[rows]
    return x.filter(rows) if is_frame(x) else x[rows]
