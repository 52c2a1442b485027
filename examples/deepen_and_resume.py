"""A transformer gets half of its blocks half-way; then the run is stopped, and goes on in a fresh process.

python examples/deepen_and_resume.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import meristem as ms

torch.set_num_threads(1)
TEXT = Path(__file__).read_text() * 4
CODE = {character: i for i, character in enumerate(sorted(set(TEXT)))}
TOKENS = torch.tensor([CODE[character] for character in TEXT])
LENGTH, STEPS = 48, 120


class Characters(nn.Module):
    """A model of one's own: nothing in it knows of growth."""

    def __init__(self, depth: int = 2, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(CODE), width)
        self.position = nn.Parameter(torch.zeros(LENGTH, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, len(CODE))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embed(tokens) + self.position
        for layer in self.layers:
            x = layer(x, src_mask=causal)
        return self.head(x)


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def batches() -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        starts = torch.randint(
            len(TOKENS) - LENGTH - 1, (16,), generator=drawn
        ).tolist()
        found.append(torch.stack([TOKENS[s : s + LENGTH + 1] for s in starts]))
    return found


def start() -> tuple[nn.Module, torch.optim.Optimizer, ms.Grower]:
    torch.manual_seed(0)
    model = Characters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    grower = ms.recipes.stack(
        model,
        optimizer,
        loss=loss,
        data=batches(),
        to={"layers": 4},
        at=f"{STEPS // 2} steps",
    )
    return model, optimizer, grower


def train(model, optimizer, grower, first: int, last: int) -> float:
    for batch in batches()[first:last]:
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        growth = grower.step(value)
        if growth:
            print(growth)
    return value.item()


with tempfile.TemporaryDirectory() as folder:
    model, optimizer, grower = start()
    train(model, optimizer, grower, 0, 90)
    ms.save(folder, model, optimizer=optimizer, grower=grower)
    straight = train(model, optimizer, grower, 90, STEPS)

    # As another process would: a fresh model of two blocks becomes the grown one.
    model, optimizer, grower = start()
    ms.load(folder, model, optimizer=optimizer, grower=grower)
    resumed = train(model, optimizer, grower, 90, STEPS)

print(f"{len(model.layers)} blocks; loss {straight:.6f}, resumed {resumed:.6f}")
assert straight == resumed
