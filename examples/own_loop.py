"""Your own training loop: a small net on handwritten digits grows where it pays.

python examples/own_loop.py            # writes own_loop.html, the report of the run
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

import meristem as ms

torch.manual_seed(0)
torch.set_num_threads(1)  # the net is small
x, y = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(
    torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y), random_state=0
)
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(x_train, y_train), batch_size=32, shuffle=True
)
model = nn.Sequential(
    nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 10)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
grower = ms.Grower(
    model,
    optimizer,
    loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    data=loader,
    when=ms.when.Every("3 epochs", growths=4),
    where=ms.where.ByGain(),
    how=ms.how.GradMax(),
    amount=8,
    budget=ms.Budget(parameters=5000),
)
for epoch in range(15):
    model.train()
    for batch in loader:
        loss = grower.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growth = grower.step(loss)
        if growth:
            print(growth)
    model.eval()
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    grower.epoch(metric=accuracy)
    print(f"epoch {epoch}: accuracy {accuracy:.3f}")
print(grower.reason or "it may still grow")
print(grower.report("own_loop.html", "Digits, grown"))
