"""scikit-learn estimators that find their own size: they start linear and grow while
that pays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.core.growth import Growth

try:
    from scipy.special import log_softmax, softmax
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler
    from sklearn.utils import check_random_state
    from sklearn.utils._param_validation import Interval, StrOptions
    from sklearn.utils.class_weight import compute_sample_weight
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import (
        _check_sample_weight,
        _check_y,
        check_consistent_length,
        check_is_fitted,
        column_or_1d,
    )
except ImportError as error:
    raise ImportError(
        "meristem.sklearn needs scikit-learn. hint: pip install 'meristem-torch[sklearn]'"
    ) from error

from meristem.sklearn.inputs import Columns, is_frame, kept, read
from meristem.sklearn.training import (
    SMALL,
    Batches,
    Record,
    Settings,
    Trainer,
    hidden,
    linear,
)

SMOOTHING = 0.1
"""Share of a label that is spread over all classes, where there are more than two."""


def _split(
    tensors: Sequence[Tensor], strata: Any, fraction: float, seed: int
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What is trained on, and what is held out to know when to stop.

    All of it is both where there is little.
    """
    count = len(tensors[0])
    if count < SMALL:
        return tensors, tensors
    rows = np.arange(count)
    try:
        kept, out = train_test_split(
            rows, test_size=fraction, random_state=seed, stratify=strata
        )
    except ValueError:  # a class with one example
        kept, out = train_test_split(rows, test_size=fraction, random_state=seed)
    training = [tensor[torch.from_numpy(kept)] for tensor in tensors]
    held_out = [tensor[torch.from_numpy(out)] for tensor in tensors]
    return training, held_out


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


def _batch_size(chosen: int | str, count: int) -> int:
    """Examples in a batch; by default a twentieth of them, within bounds."""
    if isinstance(chosen, str):
        return max(16, min(128, count // 20))
    return int(chosen)


def _plotted(estimator: _Growing, ax: Any) -> Any:
    """What `plot_growth` draws."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plot_growth needs matplotlib. hint: pip install matplotlib"
        ) from error
    if ax is None:
        _, ax = pyplot.subplots()
    passes = range(1, estimator.n_iter_ + 1)
    ax.plot(passes, estimator.loss_curve_, label="training")
    ax.plot(passes, estimator.validation_curve_, label="held out")
    for growth in estimator.growths_:
        ax.axvline(growth.step, color="grey", linewidth=0.5)
        added = [f"{name} +{count}" for name, count in growth.added.items()]
        ax.annotate(
            ", ".join(added),
            (growth.step, 1),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            fontsize=7,
        )
    title = f"hidden {estimator.hidden_}"
    ax.set(xlabel="pass", ylabel="loss", yscale="log", title=title)
    ax.legend()
    return ax


class _Growing(BaseEstimator):  # type: ignore[misc]
    """What both estimators share: scaling, growth early in training, training until the
    held-out loss stands still.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [
            Interval(Integral, 1, None, closed="left"),
            StrOptions({"auto"}),
        ],
        "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "max_growths": [Interval(Integral, 0, None, closed="left")],
        "n_iter_growth": [Interval(Integral, 1, None, closed="left")],
        "max_parameters": [Interval(Integral, 1, None, closed="left"), None],
        "categorical_features": ["array-like", StrOptions({"from_dtype"}), None],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        *,
        max_iter: int = 1000,
        batch_size: int | str = "auto",
        learning_rate_init: float = 1e-2,
        alpha: float = 1e-2,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 40,
        tol: float = 1e-4,
        max_growths: int = 3,
        n_iter_growth: int = 3,
        max_parameters: int | None = None,
        categorical_features: Any = "from_dtype",
        warm_start: bool = False,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.alpha = alpha
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.max_growths = max_growths
        self.n_iter_growth = n_iter_growth
        self.max_parameters = max_parameters
        self.categorical_features = categorical_features
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    def _settings(self) -> Settings:
        """What the trainer is told."""
        raise NotImplementedError

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = True
        return tags

    @property
    def model_(self) -> nn.Sequential:
        """The torch module."""
        return self._trainer.model

    @property
    def hidden_(self) -> list[int]:
        """Widths of the hidden layers, in order; empty where the net has stayed linear."""
        check_is_fitted(self, "model_")
        return hidden(self.model_)

    @property
    def n_parameters_(self) -> int:
        """Trained numbers in the net."""
        check_is_fitted(self, "model_")
        return sum(parameter.numel() for parameter in self.model_.parameters())

    @property
    def growths_(self) -> list[Growth]:
        """Every growth so far."""
        check_is_fitted(self, "model_")
        return self._record.growths

    @property
    def loss_curve_(self) -> list[float]:
        """The training loss after every pass."""
        check_is_fitted(self, "model_")
        return self._record.losses

    @property
    def validation_curve_(self) -> list[float]:
        """The held-out loss after every pass."""
        check_is_fitted(self, "model_")
        return self._record.held_out

    @property
    def scaler_(self) -> StandardScaler:
        """What scales the inputs of the net."""
        check_is_fitted(self, "model_")
        return self._columns.scaler

    @property
    def n_iter_(self) -> int:
        """Passes over the data."""
        check_is_fitted(self, "model_")
        return len(self.loss_curve_)

    @property
    def flops_(self) -> int:
        """Floating-point operations that fitting took, growth and its search included."""
        check_is_fitted(self, "model_")
        return self._record.meter.total

    def plot_growth(self, ax: Any = None) -> Any:
        """The losses after every pass, and what grew when; on `ax`, or on one of its
        own. Returns the matplotlib axes.
        """
        check_is_fitted(self, "model_")
        return _plotted(self, ax)

    def _fit(
        self,
        x: Any,
        targets: Tensor,
        weights: NDArray[Any],
        outputs: int,
        strata: Any,
    ) -> None:
        """Start linear, or with the net that is there; grow, and train."""
        if len(weights) < 2:
            raise ValueError(
                f"Found array with {len(weights)} sample(s) while a minimum of 2 is "
                "required."
            )
        if not weights.any():
            raise ValueError("The sample_weight of every example is zero.")
        going_on = self.warm_start and hasattr(self, "_trainer")
        if not going_on:
            self._start(x, weights, outputs)
        used = weights > 0
        importance = torch.tensor(
            weights[used] / weights[used].mean(), dtype=torch.float32
        )
        inputs = self._columns.inputs(kept(x, used))
        tensors = (inputs, targets[torch.from_numpy(used)], importance)
        with self._seeded() as seed:
            strata = strata[used] if strata is not None else None
            training, held_out = _split(tensors, strata, self.validation_fraction, seed)
            size = _batch_size(self.batch_size, len(training[0]))
            self._trainer.told = self._settings()
            self._trainer.fit(Batches(size, *training), held_out, fresh=not going_on)
            self._trainer.calibrate(held_out)

    def _partial_fit(
        self, x: Any, targets: Tensor, weights: NDArray[Any], outputs: int
    ) -> None:
        """One pass; every `n_iter_growth` of them a growth, where SENN's rule finds one
        on these very examples.
        """
        if not hasattr(self, "_trainer"):
            self._start(x, weights, outputs)
        importance = torch.tensor(weights, dtype=torch.float32)
        tensors = (self._columns.inputs(x), targets, importance)
        data = Batches(_batch_size(self.batch_size, len(targets)), *tensors)
        with self._seeded():
            self._trainer.one_pass(data, tensors)
            if self.n_iter_ % self.n_iter_growth == 0:
                self._trainer.grow_once(data)

    def _start(self, x: Any, weights: NDArray[Any], outputs: int) -> None:
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self._of_frames = is_frame(x)
        self._columns = Columns(self.categorical_features).fit(x, weights)
        self._record = Record()
        each = _cross_entropy if self._settings().classes else _squared_error
        net = linear(self._columns.count, outputs)
        self._trainer = Trainer(net, self._settings(), each, self._record)

    def _told(self, **more: Any) -> Settings:
        return Settings(
            rate=self.learning_rate_init,
            decay=self.alpha,
            passes=self.max_iter,
            patience=self.n_iter_no_change,
            tolerance=self.tol,
            growths=self.max_growths,
            between=self.n_iter_growth,
            parameters=self.max_parameters,
            verbose=bool(self.verbose),
            **more,
        )

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[int]:
        """A stream of random numbers of our own, another one at every call."""
        seed = self._seed + self.n_iter_
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            yield seed

    def _outputs(self, x: ArrayLike) -> NDArray[np.float64]:
        check_is_fitted(self, "model_")
        inputs = self._columns.inputs(read(self, x, reset=False))
        with torch.no_grad():
            found: NDArray[np.float64] = self.model_.eval()(inputs).double().numpy()
        return found


class GrowingClassifier(ClassifierMixin, _Growing):  # type: ignore[misc]
    """A neural network classifier that starts linear and finds its own width and depth.

    It grows by SENN (`meristem.how.SENN`, `meristem.where.SENN`) early in training, for
    as long as new units or a layer are worth their parameters; then AdamW trains what
    has grown until the loss on held-out data stands still. Linear data leave it linear.
    Inputs are standardised, and cut off at ten standard deviations; missing values,
    categories of data frames and sparse tables are taken as they are, infinite ones
    refused.

    Args:
        max_iter: Most passes over the data.
        batch_size: Examples per step; "auto" is a twentieth of them, between 16 and
            128.
        learning_rate_init: Step size of AdamW; it falls to zero along a cosine.
        alpha: Weight decay.
        validation_fraction: Share of the data that is held out to know when to stop.
        n_iter_no_change: Passes without a better held-out loss after which training
            ends.
        tol: Relative improvement of the held-out loss that counts.
        max_growths: Most rounds of growth; a round may be several growths.
        n_iter_growth: Passes between two rounds.
        max_parameters: Largest number of trained numbers; None for no limit.
        categorical_features: Columns of categories, by name or place; "from_dtype" for
            those of a data frame whose type says so, None for none.
        warm_start: Whether `fit` goes on from the net that is there.
        class_weight: As in scikit-learn: a dict, "balanced" or None.
        random_state: Seed.
        verbose: Print a line after every pass.

    Attributes:
        classes_: The labels.
        hidden_: Widths of the hidden layers, in order.
        growths_: Every `Growth`, with the pass after which it came in `step`.
        n_parameters_: Trained numbers. `flops_`: floating-point operations that fitting
            took, growth included.
        n_iter_: Passes over the data.
        loss_curve_: Training loss after every pass. `validation_curve_`: the held-out
            one.
        model_: The torch module. `scaler_`: what scales its inputs.

    Examples:
        >>> from sklearn.datasets import make_moons
        >>> x, y = make_moons(400, noise=0.2, random_state=0)
        >>> classifier = GrowingClassifier(random_state=0).fit(x, y)
        >>> classifier.score(x, y) > 0.9, len(classifier.hidden_) > 0
        (True, True)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **_Growing._parameter_constraints,
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }

    def __init__(
        self,
        *,
        max_iter: int = 1000,
        batch_size: int | str = "auto",
        learning_rate_init: float = 1e-2,
        alpha: float = 1e-2,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 40,
        tol: float = 1e-4,
        max_growths: int = 3,
        n_iter_growth: int = 3,
        max_parameters: int | None = None,
        categorical_features: Any = "from_dtype",
        warm_start: bool = False,
        class_weight: Any = None,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            max_iter=max_iter,
            batch_size=batch_size,
            learning_rate_init=learning_rate_init,
            alpha=alpha,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            tol=tol,
            max_growths=max_growths,
            n_iter_growth=n_iter_growth,
            max_parameters=max_parameters,
            categorical_features=categorical_features,
            warm_start=warm_start,
            random_state=random_state,
            verbose=verbose,
        )
        self.class_weight = class_weight

    def fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Train and grow."""
        self._validate_params()
        x, labels = self._checked(X, y, reset=True)
        check_classification_targets(labels)
        self.classes_ = np.unique(labels)
        codes = np.searchsorted(self.classes_, labels)
        self._fit(
            x,
            torch.tensor(codes),
            self._weights(sample_weight, x, labels),
            len(self.classes_),
            codes,
        )
        return self

    def partial_fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """One pass over some examples; a growth at every `n_iter_growth` of them, where
        one is worth it. The first call scales the inputs for all, and names all
        `classes`.
        """
        first = not hasattr(self, "_trainer")
        if first:
            self._validate_params()
            if classes is None:
                raise ValueError(
                    "classes must be passed on the first call to partial_fit."
                )
            self.classes_ = np.unique(np.asarray(classes))
        elif classes is not None and not np.array_equal(
            self.classes_, np.unique(np.asarray(classes))
        ):
            raise ValueError(
                f"`classes={classes!r}` is not the same as on last call to "
                f"partial_fit, was: {self.classes_!r}"
            )
        x, labels = self._checked(X, y, reset=first)
        check_classification_targets(labels)
        unknown = np.setdiff1d(labels, self.classes_)
        if len(unknown):
            raise ValueError(f"y holds labels that are not in classes: {list(unknown)}")
        codes = torch.tensor(np.searchsorted(self.classes_, labels))
        self._partial_fit(
            x, codes, self._weights(sample_weight, x, labels), len(self.classes_)
        )
        return self

    def _checked(
        self, X: ArrayLike, y: ArrayLike, reset: bool
    ) -> tuple[Any, NDArray[Any]]:
        x = read(self, X, reset=reset)
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        labels = column_or_1d(y, warn=True)
        check_consistent_length(x, labels)
        return x, labels

    def _weights(
        self, sample_weight: ArrayLike | None, x: Any, labels: NDArray[Any]
    ) -> NDArray[np.float64]:
        weights = _check_sample_weight(
            sample_weight, x, dtype=np.float64, ensure_non_negative=True
        )
        found: NDArray[np.float64] = weights * compute_sample_weight(
            self.class_weight, labels
        )
        return found

    def _settings(self) -> Settings:
        # Separable classes have no best linear net: the logits would grow for ever.
        # Two classes are not smoothed: their labels are then no function of a margin.
        smoothing = SMOOTHING if len(self.classes_) > 2 else 0.0
        return self._told(linear_steps=10, classes=True, smoothing=smoothing)

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities, (examples, classes), in the order of `classes_`."""
        found: NDArray[np.float64] = softmax(self._outputs(X), axis=1)
        return found

    def predict_log_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Their logarithms."""
        found: NDArray[np.float64] = log_softmax(self._outputs(X), axis=1)
        return found

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable labels."""
        outputs = self._outputs(X)
        found: NDArray[Any] = self.classes_[outputs.argmax(1)]
        return found


class GrowingRegressor(RegressorMixin, _Growing):  # type: ignore[misc]
    """A neural network regressor, of one output or several, that starts linear and
    finds its own width and depth.

    It grows by SENN (`meristem.how.SENN`, `meristem.where.SENN`) early in training, for
    as long as new units or a layer are worth their parameters; then AdamW trains what
    has grown on the squared error until that on held-out data stands still. Linear data
    leave it linear. Inputs and targets are standardised, and inputs cut off at ten
    standard deviations; missing values, categories of data frames and sparse tables are
    taken as they are, infinite ones refused.

    Args:
        max_iter: Most passes over the data.
        batch_size: Examples per step; "auto" is a twentieth of them, between 16 and
            128.
        learning_rate_init: Step size of AdamW; it falls to zero along a cosine.
        alpha: Weight decay.
        validation_fraction: Share of the data that is held out to know when to stop.
        n_iter_no_change: Passes without a better held-out loss after which training
            ends.
        tol: Relative improvement of the held-out loss that counts.
        max_growths: Most rounds of growth; a round may be several growths.
        n_iter_growth: Passes between two rounds.
        max_parameters: Largest number of trained numbers; None for no limit.
        categorical_features: Columns of categories, by name or place; "from_dtype" for
            those of a data frame whose type says so, None for none.
        warm_start: Whether `fit` goes on from the net that is there.
        random_state: Seed.
        verbose: Print a line after every pass.

    Attributes:
        hidden_: Widths of the hidden layers, in order.
        growths_: Every `Growth`, with the pass after which it came in `step`.
        n_parameters_: Trained numbers. `flops_`: floating-point operations that fitting
            took, growth included.
        n_iter_: Passes over the data.
        loss_curve_: Training loss after every pass. `validation_curve_`: the held-out
            one.
        model_: The torch module. `scaler_`: what scales its inputs.

    Examples:
        >>> x = np.random.default_rng(0).normal(size=(400, 2))
        >>> regressor = GrowingRegressor(random_state=0).fit(x, x[:, 0] * x[:, 1])
        >>> regressor.score(x, x[:, 0] * x[:, 1]) > 0.9
        True
    """

    def fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Train and grow."""
        self._validate_params()
        x, columns, weights = self._checked(X, y, sample_weight, reset=True)
        self.target_scaler_ = StandardScaler().fit(columns, sample_weight=weights)
        self._fit(x, self._targets(columns), weights, columns.shape[1], None)
        return self

    def partial_fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> Self:
        """One pass over some examples; a growth at every `n_iter_growth` of them, where
        one is worth it. The first call scales inputs and targets for all.
        """
        first = not hasattr(self, "_trainer")
        if first:
            self._validate_params()
        x, columns, weights = self._checked(X, y, sample_weight, reset=first)
        if first:
            self.target_scaler_ = StandardScaler().fit(columns, sample_weight=weights)
        self._partial_fit(x, self._targets(columns), weights, columns.shape[1])
        return self

    def _checked(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None, reset: bool
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.float64]]:
        x = read(self, X, reset=reset)
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        targets = _check_y(y, multi_output=True, y_numeric=True, estimator=self)
        check_consistent_length(x, targets)
        if targets.ndim == 2 and targets.shape[1] == 1:
            targets = column_or_1d(targets, warn=True)
        weights = _check_sample_weight(
            sample_weight, x, dtype=np.float64, ensure_non_negative=True
        )
        if reset:
            self._shape = targets.shape[1:]
        elif targets.shape[1:] != self._shape:
            raise ValueError(
                f"y has the shape {targets.shape[1:]} per example; on the first call "
                f"it was {self._shape}"
            )
        return x, targets.reshape(len(x), -1).astype(np.float64), weights

    def _targets(self, columns: NDArray[np.float64]) -> Tensor:
        return torch.tensor(self.target_scaler_.transform(columns), dtype=torch.float32)

    def _settings(self) -> Settings:
        return self._told(linear_steps=100, classes=False)

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """The targets, shaped as in `fit`."""
        check_is_fitted(self, "model_")
        outputs = self.target_scaler_.inverse_transform(self._outputs(X))
        found: NDArray[np.float64] = outputs.reshape(len(outputs), *self._shape)
        return found
