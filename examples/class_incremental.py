"""Classes come task by task: the head grows, old logits and Adam's moments stay.

    python examples/class_incremental.py

A little of every old task is kept and replayed; what the growth itself does to old classes is printed.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import meristem as ms

torch.manual_seed(0)
torch.set_num_threads(1)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
test = torch.arange(len(x)) % 4 == 0
TASKS = [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)]
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, len(TASKS[0])))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
kept_x, kept_y = torch.zeros(0, 64), torch.zeros(0, dtype=torch.long)

for number, classes in enumerate(TASKS):
    if number:
        with torch.no_grad():
            before = model(x[test])
        growth = ms.expand_(
            model, f"classes=+{len(classes)}", x[:4], optimizer=optimizer
        )
        with torch.no_grad():
            moved = (model(x[test])[:, : before.shape[1]] - before).abs().max().item()
        print(f"rows {growth.rows} are new; old logits moved by {moved:.1e}")
        assert moved < 1e-4
    mine = torch.isin(y, torch.tensor(classes)) & ~test
    now_x, now_y = torch.cat([x[mine], kept_x]), torch.cat([y[mine], kept_y])
    for _ in range(15):
        for batch in torch.randperm(len(now_x)).split(32):
            loss = F.cross_entropy(model(now_x[batch]), now_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    kept_x, kept_y = (
        torch.cat([kept_x, x[mine][:40]]),
        torch.cat([kept_y, y[mine][:40]]),
    )
    with torch.no_grad():
        right = model(x[test]).argmax(1) == y[test]
    for known in TASKS[: number + 1]:
        share = right[torch.isin(y[test], torch.tensor(known))].float().mean().item()
        print(f"after task {number}: classes {known} {share:.3f}")
