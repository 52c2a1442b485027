"""scikit-learn estimators that find their own size: they start linear and grow while
the held-out loss says that it pays.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from meristem import where
from meristem.core.budget import Budget
from meristem.core.growth import Growth
from meristem.core.offer import Share
from meristem.grower import Grower
from meristem.how import SENN
from meristem.lab.ledger import Meter
from meristem.when import Every
from meristem.where import Choice

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
        check_is_fitted,
        column_or_1d,
        validate_data,
    )
except ImportError as error:
    raise ImportError(
        "meristem.sklearn needs scikit-learn. hint: pip install 'meristem-torch[sklearn]'"
    ) from error

FAR = 10.0
"""Standard deviations at which inputs are cut off: one rare value of 70 would throw the
weights of a whole batch about.
"""
AVERAGED = 0.99
"""Weight of the past in the running average of the weights that a trained net ends
with.
"""
LEAST = 32
"""Units that a width gains at least."""
LOOKED_AT = 512
"""Examples in a batch on which growth is measured, at the most."""
SMALL = 20
"""Fewer examples than this are too few to hold some of them out."""


class _Batches:
    """Shuffled minibatches of tensors, in another order at every pass, drawn from
    torch's own generator.
    """

    def __init__(self, size: int, *tensors: Tensor) -> None:
        self.size, self.tensors = size, tensors

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for rows in torch.randperm(len(self.tensors[0])).split(self.size):
            yield tuple(tensor[rows] for tensor in self.tensors)


@dataclass
class _State:
    """A net in training."""

    model: nn.Sequential
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class _Bold:
    """The axis that adds most by SENN's rule gets half of what it has, `LEAST` units at
    least, or one layer.

    Held-out data stop training in time, so units need not be worth their parameters one
    by one, as the rule asks.
    """

    reads_gains: ClassVar[bool] = True
    weighs_kinds: ClassVar[bool] = True

    def share(self, choice: Choice) -> Share:
        share = where.SENN(patience=1, per="growth").share(choice)
        kinds = {axis.name: axis for axis in choice.axes}
        counts = {}
        for name in share.counts:
            axis = kinds[name]
            counts[name] = _bold(axis.size) if axis.slots else 1
        return replace(share, counts=counts)


def _scaled(scaler: StandardScaler, x: NDArray[Any]) -> Tensor:
    """Inputs in standard deviations, far ones cut off."""
    clipped = np.clip(scaler.transform(x), -FAR, FAR)
    return torch.tensor(clipped, dtype=torch.float32)


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
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        *,
        max_iter: int = 1000,
        batch_size: int | str = "auto",
        learning_rate_init: float = 3e-3,
        alpha: float = 1e-4,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 20,
        tol: float = 1e-4,
        max_growths: int = 8,
        n_iter_growth: int = 5,
        max_parameters: int | None = None,
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
        self.random_state = random_state
        self.verbose = verbose

    # Steps of L-BFGS towards the best linear net.
    _linear_steps: ClassVar[int] = 100

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of every example."""
        raise NotImplementedError

    @property
    def model_(self) -> nn.Sequential:
        """The torch module."""
        return self._state.model

    @property
    def hidden_(self) -> list[int]:
        """Widths of the hidden layers, in order; empty where the net has stayed linear."""
        check_is_fitted(self, "model_")
        return _hidden(self.model_)

    @property
    def n_parameters_(self) -> int:
        """Trained numbers in the net."""
        check_is_fitted(self, "model_")
        return sum(parameter.numel() for parameter in self.model_.parameters())

    @property
    def n_iter_(self) -> int:
        """Passes over the data."""
        check_is_fitted(self, "model_")
        return len(self.loss_curve_)

    @property
    def flops_(self) -> int:
        """Floating-point operations that fitting took, growth and its search included."""
        check_is_fitted(self, "model_")
        return self._meter.total

    def plot_growth(self, ax: Any = None) -> Any:
        """The losses after every pass, and what grew when; on `ax`, or on one of its
        own. Returns the matplotlib axes.
        """
        check_is_fitted(self, "model_")
        return _plotted(self, ax)

    def _fit(
        self,
        x: NDArray[Any],
        targets: Tensor,
        weights: NDArray[Any],
        outputs: int,
        strata: Any,
    ) -> None:
        """Start linear, and train and grow until the held-out loss stands still."""
        self._start(x, weights, outputs)
        kept = weights > 0
        importance = torch.tensor(
            weights[kept] / weights[kept].mean(), dtype=torch.float32
        )
        tensors = (
            _scaled(self.scaler_, x[kept]),
            targets[torch.from_numpy(kept)],
            importance,
        )
        with self._seeded() as seed:
            strata = strata[kept] if strata is not None else None
            training, held_out = _split(tensors, strata, self.validation_fraction, seed)
            self._fit_and_grow(
                _Batches(_batch_size(self.batch_size, len(training[0])), *training),
                held_out,
            )

    def _partial_fit(
        self, x: NDArray[Any], targets: Tensor, weights: NDArray[Any], outputs: int
    ) -> None:
        """One pass; every `n_iter_growth` of them a growth, where SENN's rule finds one
        on these very examples.
        """
        if not hasattr(self, "model_"):
            self._start(x, weights, outputs)
        tensors = (
            _scaled(self.scaler_, x),
            targets,
            torch.tensor(weights, dtype=torch.float32),
        )
        data = _Batches(_batch_size(self.batch_size, len(x)), *tensors)
        with self._seeded():
            self._pass(self._state, data, tensors)
            if self.n_iter_ % self.n_iter_growth == 0:
                grower = self._grower(self._state, data)
                growth = self._grown(grower) if grower is not None else None
                self.growths_ += [growth] if growth is not None else []

    def _start(self, x: NDArray[Any], weights: NDArray[Any], outputs: int) -> None:
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.scaler_ = StandardScaler().fit(x, sample_weight=weights)
        linear = nn.Linear(x.shape[1], outputs)
        # From zero the linear fit is the same for every seed.
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        optimizer = torch.optim.AdamW(
            linear.parameters(), lr=self.learning_rate_init, weight_decay=self.alpha
        )
        self._state = _State(nn.Sequential(linear), optimizer)
        self._meter = Meter()
        self.growths_: list[Growth] = []
        self.loss_curve_: list[float] = []
        self.validation_curve_: list[float] = []

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[int]:
        """A stream of random numbers of our own, another one at every call."""
        seed = self._seed + self.n_iter_
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            yield seed

    def _fit_and_grow(self, data: _Batches, held_out: Sequence[Tensor]) -> None:
        """Grow while SENN's rule finds something, a few passes apart; train what has
        grown until the held-out loss stands still, and once more at a tenth of the
        rate. A net that has stayed linear is asked again when it has been trained.

        Growth comes early: what starts from a small net that was trained to its end
        ends worse.
        """
        state = self._state
        self._solve(state.model, data.tensors)
        self._grow(state, data, held_out)
        state = self._trained(state, data, held_out)
        for group in state.optimizer.param_groups:
            group["lr"] = self.learning_rate_init / 10
        self._state = self._trained(state, data, held_out)
        for group in self._state.optimizer.param_groups:
            group["lr"] = self.learning_rate_init

    def _solve(self, model: nn.Sequential, tensors: Sequence[Tensor]) -> None:
        """The best linear net, to which new units have to add something.

        Before it is reached, what a change of its weights would give, the scale of its
        outputs above all, looks like a feature that is missing.
        """
        optimizer = torch.optim.LBFGS(
            model.parameters(),
            max_iter=self._linear_steps,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self._weighted(model, tensors)
            loss.backward()
            return loss

        optimizer.step(closure)

    def _grow(self, state: _State, data: _Batches, held_out: Sequence[Tensor]) -> None:
        """Grow a few passes apart, for as long as SENN's rule finds something."""
        grower = self._grower(state, data)
        while grower is not None and not grower.done and self.n_iter_ < self.max_iter:
            growth = self._grown(grower)
            if growth is None:
                continue
            self.growths_.append(growth)
            for _ in range(min(self.n_iter_growth, self.max_iter - self.n_iter_)):
                self._pass(state, data, held_out)

    def _grower(self, state: _State, data: _Batches) -> Grower | None:
        """What grows a net; None where growth is used up, or cannot be measured: too
        few examples, or targets all alike.
        """
        examples, left = len(data.tensors[0]), self.max_growths - len(self.growths_)
        if (
            examples < SMALL
            or left < 1
            or not (data.tensors[1] != data.tensors[1][0]).any()
        ):
            return None
        # Twelve batches at least, so that a third of them can measure.
        looked = _Batches(max(1, min(LOOKED_AT, examples // 12)), *data.tensors)
        budget = Budget(parameters=self.max_parameters, growths=left)
        return Grower(
            state.model,
            state.optimizer,
            loss=self._weighted,
            data=looked,
            when=Every(epochs=1),
            where=_Bold(),
            how=SENN(activation="prelu", steps=64),
            budget=budget,
        )

    def _grown(self, grower: Grower) -> Growth | None:
        before = grower.flops
        amount = max(_bold(width) for width in _hidden(grower.model) or [1])
        grower.settings = replace(grower.settings, amount=amount)
        growth = grower.grow()
        self._meter = self._meter.at_new_size()
        self._meter.total += grower.flops - before
        if growth is not None:
            growth.step = self.n_iter_
        return growth

    def _trained(
        self, state: _State, data: _Batches, held_out: Sequence[Tensor]
    ) -> _State:
        """Train until the held-out loss of the averaged weights has not fallen for a
        while; these, where it was lowest.
        """
        # The weights of the lowest loss, not of the last pass.
        best, since = copy.deepcopy(state), 0
        lowest = self._held_out_loss(state.model, held_out)
        average = AveragedModel(
            state.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGED)
        )
        while since < self.n_iter_no_change and self.n_iter_ < self.max_iter:
            value = self._pass(state, data, held_out, average)
            since += 1
            if value < lowest * (1 - self.tol):
                best, lowest, since = copy.deepcopy(state), value, 0
                best.model.load_state_dict(average.module.state_dict())
        return best

    def _pass(
        self,
        state: _State,
        data: _Batches,
        held_out: Sequence[Tensor],
        average: AveragedModel | None = None,
    ) -> float:
        """One pass of training; the held-out loss after it, of the averaged weights
        where there are some.
        """

        def step(batch: Sequence[Tensor]) -> float:
            loss = self._weighted(state.model, batch)
            state.optimizer.zero_grad()
            loss.backward()
            state.optimizer.step()
            return loss.item() * len(batch[0])

        total = 0.0
        for batch in data:
            total += self._meter.run(batch, partial(step, batch))
            if average is not None:
                average.update_parameters(state.model)
        self.loss_curve_.append(total / len(data.tensors[0]))
        self.validation_curve_.append(
            self._held_out_loss(average or state.model, held_out)
        )
        if self.verbose:
            losses = f"loss {self.loss_curve_[-1]:.4f}, held out {self.validation_curve_[-1]:.4f}"
            print(f"pass {self.n_iter_}: {losses}, hidden {_hidden(state.model)}")
        return self.validation_curve_[-1]

    def _weighted(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        inputs, targets, importance = batch
        return (self._loss(model(inputs), targets) * importance).mean()

    def _held_out_loss(self, model: nn.Module, held_out: Sequence[Tensor]) -> float:
        with torch.no_grad():
            return self._weighted(model, held_out).item()

    def _outputs(self, x: ArrayLike) -> NDArray[np.float64]:
        check_is_fitted(self, "model_")
        rows = validate_data(self, x, reset=False, dtype=np.float64)
        with torch.no_grad():
            found: NDArray[np.float64] = (
                self.model_.eval()(_scaled(self.scaler_, rows)).double().numpy()
            )
        return found


def _bold(width: int) -> int:
    return max(LEAST, width // 2)


def _hidden(model: nn.Module) -> list[int]:
    return [
        module.out_features
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ][:-1]


class GrowingClassifier(ClassifierMixin, _Growing):  # type: ignore[misc]
    """A neural network classifier that starts linear and finds its own width and depth.

    It grows by SENN (`meristem.how.SENN`, `meristem.where.SENN`) early in training, for
    as long as new units or a layer are worth their parameters; then AdamW trains what
    has grown until the loss on held-out data stands still. Linear data leave it linear.
    Inputs are standardised, and cut off at ten standard deviations; NaN, infinite and
    sparse inputs are refused.

    Args:
        max_iter: Most passes over the data.
        batch_size: Examples per step; "auto" is a twentieth of them, between 16 and
            128.
        learning_rate_init: Step size of AdamW; a tenth of it at the end.
        alpha: Weight decay.
        validation_fraction: Share of the data that is held out to know when to stop.
        n_iter_no_change: Passes without a better held-out loss after which training
            ends.
        tol: Relative improvement of the held-out loss that counts.
        max_growths: Most growths.
        n_iter_growth: Passes between two growths.
        max_parameters: Largest number of trained numbers; None for no limit.
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

    # Separable classes have no best net: the logits of rare ones would grow for ever.
    _linear_steps: ClassVar[int] = 10
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **_Growing._parameter_constraints,
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }

    def __init__(
        self,
        *,
        max_iter: int = 1000,
        batch_size: int | str = "auto",
        learning_rate_init: float = 3e-3,
        alpha: float = 1e-4,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 20,
        tol: float = 1e-4,
        max_growths: int = 8,
        n_iter_growth: int = 5,
        max_parameters: int | None = None,
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
            random_state=random_state,
            verbose=verbose,
        )
        self.class_weight = class_weight

    def fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Train and grow."""
        self._validate_params()
        x, labels = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
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
        first = not hasattr(self, "model_")
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
        x, labels = validate_data(self, X, y, dtype=np.float64, reset=first)
        check_classification_targets(labels)
        unknown = np.setdiff1d(labels, self.classes_)
        if len(unknown):
            raise ValueError(f"y holds labels that are not in classes: {list(unknown)}")
        codes = torch.tensor(np.searchsorted(self.classes_, labels))
        self._partial_fit(
            x, codes, self._weights(sample_weight, x, labels), len(self.classes_)
        )
        return self

    def _weights(
        self, sample_weight: ArrayLike | None, x: NDArray[Any], labels: NDArray[Any]
    ) -> NDArray[np.float64]:
        weights = _check_sample_weight(
            sample_weight, x, dtype=np.float64, ensure_non_negative=True
        )
        found: NDArray[np.float64] = weights * compute_sample_weight(
            self.class_weight, labels
        )
        return found

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

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
    standard deviations; NaN, infinite and sparse inputs are refused.

    Args:
        max_iter: Most passes over the data.
        batch_size: Examples per step; "auto" is a twentieth of them, between 16 and
            128.
        learning_rate_init: Step size of AdamW; a tenth of it at the end.
        alpha: Weight decay.
        validation_fraction: Share of the data that is held out to know when to stop.
        n_iter_no_change: Passes without a better held-out loss after which training
            ends.
        tol: Relative improvement of the held-out loss that counts.
        max_growths: Most growths.
        n_iter_growth: Passes between two growths.
        max_parameters: Largest number of trained numbers; None for no limit.
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
        first = not hasattr(self, "model_")
        if first:
            self._validate_params()
        x, columns, weights = self._checked(X, y, sample_weight, reset=first)
        if first:
            self.target_scaler_ = StandardScaler().fit(columns, sample_weight=weights)
        self._partial_fit(x, self._targets(columns), weights, columns.shape[1])
        return self

    def _checked(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None, reset: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        x, targets = validate_data(
            self,
            X,
            y,
            dtype=np.float64,
            multi_output=True,
            y_numeric=True,
            reset=reset,
            ensure_min_samples=2,
        )
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

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean(1)

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """The targets, shaped as in `fit`."""
        check_is_fitted(self, "model_")
        outputs = self.target_scaler_.inverse_transform(self._outputs(X))
        found: NDArray[np.float64] = outputs.reshape(len(outputs), *self._shape)
        return found
