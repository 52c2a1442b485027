"""A table: the classifier finds its own size, beside a fixed net of scikit-learn.

python examples/tabular.py
"""

import torch
from sklearn.datasets import load_breast_cancer, make_moons
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from meristem.sklearn import GrowingClassifier

torch.set_num_threads(1)
TABLES = {
    "moons": make_moons(600, noise=0.2, random_state=0),
    "breast cancer": load_breast_cancer(return_X_y=True),
}
for name, (x, y) in TABLES.items():
    x_train, x_test, y_train, y_test = train_test_split(x, y, random_state=0)
    growing = GrowingClassifier(random_state=0).fit(x_train, y_train)
    fixed = make_pipeline(
        StandardScaler(), MLPClassifier(max_iter=1000, random_state=0)
    )
    fixed.fit(x_train, y_train)
    print(
        f"{name}: grown {growing.score(x_test, y_test):.3f} with hidden layers "
        f"{growing.hidden_} and {growing.n_parameters_} parameters; "
        f"100 fixed units {fixed.score(x_test, y_test):.3f}"
    )
