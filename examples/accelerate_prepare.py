"""Low precision in a loop on Accelerate: `prepare` in place of `accelerator.prepare`."""

import torch
from accelerate import Accelerator

from lowprec.training.accelerate import prepare

accelerator = Accelerator()
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256))
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer = prepare(accelerator, model, optimizer, precision="fp8_blockwise")
for step in range(5):
    loss = model(torch.randn(32, 256, device=accelerator.device)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
