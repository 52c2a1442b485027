"""The scikit-learn estimators: scikit-learn's own checks, and what they promise beyond."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris, make_moons
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from meristem.sklearn import GrowingClassifier, GrowingRegressor

DRAWN = "minibatches and the held-out part are drawn: removing an example, or giving it twice, draws others"
STOCHASTIC = {
    "check_sample_weight_equivalence_on_dense_data": DRAWN,
    "check_sample_weight_equivalence_on_sparse_data": DRAWN,
}


@parametrize_with_checks(
    [
        GrowingClassifier(max_iter=10, max_growths=1),
        GrowingRegressor(max_iter=25, max_growths=1),
    ],
    expected_failed_checks=lambda _: STOCHASTIC,
)
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def draw(rows: int = 300, inputs: int = 4) -> tuple[np.ndarray, np.random.Generator]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(rows, inputs)), generator


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_linear_data_leave_the_net_linear(noise: float) -> None:
    x, generator = draw()
    y = x @ [1.0, -2, 0.5, 3] + noise * generator.normal(size=len(x))
    fitted = GrowingRegressor(random_state=0).fit(x, y)
    assert fitted.hidden_ == []
    assert fitted.growths_ == []
    assert fitted.n_parameters_ == 5
    assert fitted.score(x, y) > (0.97 if noise else 0.999)


def test_two_moons_open_a_hidden_layer() -> None:
    x, y = make_moons(300, noise=0.2, random_state=0)
    unseen, labels = make_moons(1000, noise=0.2, random_state=1)
    fitted = GrowingClassifier(random_state=0, max_growths=4).fit(x, y)
    assert len(fitted.hidden_) >= 1
    assert fitted.score(unseen, labels) > 0.94
    np.testing.assert_allclose(fitted.predict_proba(unseen).sum(1), 1)
    assert fitted.flops_ > sum(growth.flops for growth in fitted.growths_) > 0
    again = GrowingClassifier(random_state=0, max_growths=4).fit(x, y)
    np.testing.assert_array_equal(
        again.predict_proba(unseen), fitted.predict_proba(unseen)
    )
    back = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(
        back.predict_proba(unseen), fitted.predict_proba(unseen)
    )
    assert back.hidden_ == fitted.hidden_


def test_several_outputs() -> None:
    x, _ = draw(400, 4)
    y = np.stack([x[:, 0] * x[:, 1], np.abs(x[:, 2]), x[:, 3]], 1)
    fitted = GrowingRegressor(random_state=0, max_iter=100, max_growths=4).fit(x, y)
    assert fitted.predict(x).shape == y.shape
    assert fitted.score(x, y) > 0.8


def test_in_a_pipeline_and_a_grid() -> None:
    x, y = load_iris(return_X_y=True)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), GrowingClassifier(max_iter=25, max_growths=2, random_state=0)),
        {"growingclassifier__learning_rate_init": [3e-3, 1e-2]}, cv=2,
    )  # fmt: skip
    assert search.fit(x, y).best_score_ > 0.85
    assert (
        clone(search.best_estimator_).get_params()["growingclassifier__max_iter"] == 25
    )


def test_partial_fit_grows() -> None:
    x, y = make_moons(1200, noise=0.2, random_state=0)
    model = GrowingClassifier(random_state=0, n_iter_growth=4)
    with pytest.raises(ValueError, match="classes"):
        model.partial_fit(x[:400], y[:400])
    for turn in range(12):
        part = slice(400 * (turn % 3), 400 * (turn % 3 + 1))
        model.partial_fit(x[part], y[part], classes=[0, 1])
    assert model.n_iter_ == 12
    assert len(model.growths_) >= 1
    assert model.hidden_
    with pytest.raises(ValueError, match="classes"):
        model.partial_fit(x, y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="not in classes"):
        model.partial_fit(x[:40], y[:40] + 1)
    regressor = GrowingRegressor(random_state=0).partial_fit(x, y).partial_fit(x, y)
    assert regressor.n_iter_ == 2
    with pytest.raises(ValueError, match="shape"):
        regressor.partial_fit(x, np.stack([y, y], 1))


def test_weights_and_limits() -> None:
    x, y = make_moons(300, noise=0.25, random_state=0)
    plain = GrowingClassifier(random_state=0, max_iter=20).fit(x, y)
    heavy = GrowingClassifier(
        random_state=0, max_iter=20, class_weight={0: 1, 1: 20}
    ).fit(x, y)
    assert heavy.predict(x).mean() > plain.predict(x).mean()
    with pytest.raises(ValueError, match=r"[Ss]ample.weight"):
        GrowingClassifier().fit(x, y, sample_weight=np.zeros(len(x)))
    assert (
        GrowingClassifier(random_state=0, max_growths=0, max_iter=20).fit(x, y).hidden_
        == []
    )
    assert (
        GrowingClassifier(random_state=0, max_parameters=20, max_iter=40)
        .fit(x, y)
        .n_parameters_
        <= 20
    )


@pytest.mark.parametrize(
    "case", ["constant", "one class", "few", "wide targets", "large"]
)
def test_odd_data_never_give_nan(case: str) -> None:
    x, generator = draw(60)
    y: Any = generator.integers(0, 2, 60)
    kind: Any = GrowingClassifier
    if case == "constant":
        x = np.ones_like(x)
    elif case == "one class":
        y = np.zeros(60)
    elif case == "few":
        x, y = x[:5], np.array([0, 1, 0, 1, 1])
    elif case == "wide targets":
        x, y, kind = x[:12], generator.normal(size=(12, 30)), GrowingRegressor
    elif case == "large":
        x, y, kind = x * 1e12, x[:, 0] * 1e9, GrowingRegressor
    fitted = kind(random_state=0, max_iter=30).fit(x, y)
    assert np.isfinite(fitted.predict(x)).all()
    assert all(bool(p.isfinite().all()) for p in fitted.model_.parameters())


@pytest.mark.parametrize("kind", [GrowingClassifier, GrowingRegressor])
def test_bad_input_gets_scikit_learns_own_errors(kind: Any) -> None:
    x, _ = draw(40)
    y = np.arange(40) % 2
    with pytest.raises(ValueError, match="infinity"):
        kind().fit(np.where(x > 1, np.inf, x), y)
    with pytest.raises(ValueError, match="max_iter"):
        kind(max_iter=0).fit(x, y)
    with pytest.raises(NotFittedError):
        kind().predict(x)
    with pytest.raises(NotFittedError):
        _ = kind().hidden_
    with pytest.raises(ValueError, match="sample"):
        kind().fit(x[:1], y[:1])


def test_growth_is_drawn() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, y = make_moons(300, noise=0.2, random_state=0)
    fitted = GrowingClassifier(random_state=0, max_iter=15).fit(x, y)
    ax = fitted.plot_growth()
    assert len(ax.lines) == 2 + len(fitted.growths_)
    assert fitted.plot_growth(ax) is ax
    pyplot.close("all")


def linear_problem(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(800, 5))
    form = x @ generator.normal(size=5)
    if kind == "regression":
        return x, form + 0.5 * generator.normal(size=800)
    if kind == "separable":
        return x, (form + 0.05 * generator.normal(size=800) > 0).astype(int)
    return x, (generator.random(800) < 1 / (1 + np.exp(-2 * form))).astype(int)


@pytest.mark.parametrize("kind", ["separable", "logistic", "regression"])
def test_where_a_linear_model_is_right_nothing_grows(kind: str) -> None:
    estimator = GrowingRegressor if kind == "regression" else GrowingClassifier
    linear = 0
    for seed in range(20):
        x, y = linear_problem(kind, seed)
        # Whether to grow is decided before the first pass, or after a short training.
        linear += estimator(random_state=seed, max_iter=15).fit(x, y).hidden_ == []
    assert linear >= 19


def test_missing_values_and_sparse_tables() -> None:
    from scipy.sparse import csr_matrix

    x, generator = draw(400)
    y = (np.abs(x[:, 0]) > 0.7).astype(int)
    holes = np.where(generator.random(x.shape) < 0.1, np.nan, x)
    model = GrowingClassifier(random_state=0).fit(holes, y)
    assert model.hidden_
    assert model.score(holes, y) > 0.85
    # Whether a number is missing tells something, too.
    told = GrowingClassifier(random_state=0).fit(
        holes, np.isnan(holes[:, 1]).astype(int)
    )
    assert told.score(holes, np.isnan(holes[:, 1]).astype(int)) > 0.98
    thin = csr_matrix(np.where(np.abs(x) < 1, 0, x))
    model = GrowingRegressor(random_state=0, max_iter=30).fit(thin, x[:, 0])
    np.testing.assert_allclose(
        model.predict(thin), model.predict(thin.toarray()), rtol=1e-6
    )


def test_data_frames_with_categories() -> None:
    pandas = pytest.importorskip("pandas")
    x, generator = draw(400)
    frame = pandas.DataFrame(x, columns=list("abcd"))
    frame["kind"] = pandas.Categorical(generator.choice(["red", "green", "blue"], 400))
    frame.loc[frame.index[:20], "a"] = np.nan
    y = frame["kind"].map({"red": 0.0, "green": 5.0, "blue": -5.0}).astype(float)
    model = GrowingRegressor(random_state=0).fit(frame, y)
    assert model.score(frame, y) > 0.95
    assert list(model.feature_names_in_) == [*"abcd", "kind"]
    # A category that was never seen is none of the known ones.
    unseen = frame.assign(kind="purple")
    assert np.isfinite(model.predict(unseen)).all()
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame.rename(columns={"a": "z"}))


def test_named_categories_of_an_array() -> None:
    x, generator = draw(400)
    x[:, 3] = generator.integers(0, 4, 400)
    y = np.array([0, 3, -2, 1])[x[:, 3].astype(int)] + 0.1 * x[:, 0]
    model = GrowingRegressor(random_state=0, categorical_features=[3]).fit(x, y)
    assert model.score(x, y) > 0.99
    assert model.scaler_.n_features_in_ == 3 + 4


def test_warm_start_goes_on_from_the_net_that_is_there() -> None:
    x, y = make_moons(400, noise=0.2, random_state=0)
    model = GrowingClassifier(random_state=0, max_iter=30, warm_start=True).fit(x, y)
    before, trained = model.hidden_, model.n_iter_
    lowest = min(model.validation_curve_)
    model.set_params(max_iter=60, max_growths=0).fit(x, y)
    assert model.hidden_ == before
    assert model.n_iter_ > trained
    # It does not start anew: the first further pass is near the best one.
    assert model.validation_curve_[trained] < 2 * lowest
