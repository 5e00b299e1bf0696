"""Muon for the weight matrices and convolutions, AdamW for everything else.

Muon replaces each matrix' momentum by the nearest orthogonal matrix. On a model
and a budget this small it needs clearly fewer steps than AdamW alone.
"""
import math

import torch


def orthogonal(g, steps=5):
    """Newton-Schulz iteration towards U V^T of g = U S V^T (K. Jordan's coefficients)."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                m = state.setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(m, group["momentum"]).flatten(1)  # Nesterov
                # the factor gives the update the size of an AdamW update
                scale = 0.2 * math.sqrt(max(update.shape))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonal(update).view_as(p), alpha=-group["lr"] * scale)


class Optimizer:
    """Both optimisers with one schedule: linear warm-up, then cosine from 1 to `floor`."""

    def __init__(self, model, lr, plain=(), warmup=20, floor=0.0, muon=True, muon_lr=1.0,
                 weight_decay=0.0):
        matrices, others = [], []
        for name, p in model.named_parameters():
            if p.requires_grad:
                big = muon and p.ndim >= 2 and not any(word in name for word in plain)
                (matrices if big else others).append(p)
        self.parts = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)]
        if matrices:
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay))
        self.params = matrices + others
        self.lr, self.muon_lr, self.warmup, self.floor = lr, muon_lr, warmup, floor

    def step(self, step, progress):
        """`progress` runs from 0 to 1 over the training."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        lr = self.lr * min(1.0, (step + 1) / self.warmup) * (self.floor + (1 - self.floor) * cosine)
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * (self.muon_lr if isinstance(part, Muon) else 1.0)
            part.step()
            part.zero_grad(set_to_none=True)
