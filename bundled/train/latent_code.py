"""The latent space: 16 numbers for each 8 x 8 block of pixels, fixed before any training.

They are the block's 16 principal components over the training pictures, which keep 96 % of
their variance. A code known in advance saves most of the autoencoder's training: decoder,
encoder and transformer are each trained towards it by themselves, in any order.
"""
import torch
import torch.nn.functional as F

from data import COLOURS, compose


def blocks(x):
    """(B, 3, H, W) pixels -> (B, H/8 * W/8, 192)."""
    return F.unfold(x, 8, stride=8).transpose(1, 2)


class Code:
    def __init__(self, emoji):
        x = torch.cat([blocks(torch.stack([compose(e, c) for c in COLOURS.values()])) for e in emoji])
        x = x.reshape(-1, 192)
        self.mean = x.mean(0)
        variance, axes = torch.linalg.eigh((x - self.mean).T @ (x - self.mean) / len(x))
        # halfway (in the exponent) between raw components, where the first two are nearly
        # everything, and whitened ones, where fine detail weighs as much as the colours
        axes = axes.flip(1)[:, :16]
        axes = axes * axes.sum(0).sign()  # the sign of a component is arbitrary: settle it
        axes = axes / variance.flip(0)[:16] ** 0.25
        self.axes = axes / ((x - self.mean) @ axes).std()

    def __call__(self, x):
        z = (blocks(x) - self.mean) @ self.axes
        return z.transpose(1, 2).reshape(len(x), 16, x.shape[2] // 8, x.shape[3] // 8)
