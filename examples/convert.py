"""Convert a torch model in place, print the plan, train one step, and convert it back."""

import torch

import lowprec

model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256))
print(lowprec.convert(model, "fp8_blockwise"))
optimizer = torch.optim.AdamW(model.parameters())
model(torch.randn(32, 256)).square().mean().backward()
optimizer.step()
lowprec.revert(model)
